"""The real tritonserver: started, broken in every way that was seen to happen, healed and stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from liber_runtime.exceptions import ConfigurationError, ServerError
from liber_runtime.server import TritonServer, find_tritonserver
from liber_runtime.server.process import find_ports
from liber_runtime.server.stubs import parse_stub

grpcclient = pytest.importorskip("tritonclient.grpc")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton runs on Linux")

PATIENCE_SECONDS = 20.0

MODEL = """
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        {initialize}

    def execute(self, requests):
        return [self.add(pb_utils.get_input_tensor_by_name(request, "{input}").as_numpy()) for request in requests]

    def add(self, values):
        return pb_utils.InferenceResponse([pb_utils.Tensor("{output}", values + np.float32({amount}))])
"""
CONFIGURATION = """
name: "{name}"
{kind}
max_batch_size: 0
input [{{ name: "{input}" data_type: TYPE_FP32 dims: [-1] }}]
output [{{ name: "{output}" data_type: TYPE_FP32 dims: [-1] }}]
"""
STEPS = """
ensemble_scheduling {
  step [
    { model_name: "first" model_version: -1 input_map { key: "X" value: "X" } output_map { key: "Y" value: "middle" } },
    { model_name: "second" model_version: -1 input_map { key: "Y" value: "middle" } output_map { key: "Z" value: "Z" } }
  ]
}
"""


def write_model(directory: Path, tensors: str, *, amount: float = 1, count: int = 1, initialize: str = "pass") -> None:
    """Version 1 of a model that adds `amount`; tensors: the names of its input and its output."""
    write_version(directory, 1, tensors, amount, initialize)
    configuration = CONFIGURATION.format(
        name=directory.name, kind='backend: "python"', input=tensors[0], output=tensors[1]
    )
    (directory / "config.pbtxt").write_text(configuration + f"instance_group [{{ kind: KIND_CPU count: {count} }}]\n")


def write_version(directory: Path, version: int, tensors: str, amount: float, initialize: str = "pass") -> None:
    (directory / str(version)).mkdir(parents=True)
    (directory / str(version) / "model.py").write_text(
        MODEL.format(input=tensors[0], output=tensors[1], amount=amount, initialize=initialize)
    )


def write_chain(repository: Path) -> Path:
    """first (two instances) adds 1, second (versions 1 and 2 loaded, 3 not) adds 10 or 20; the ensemble is both."""
    write_model(repository / "first", "XY", count=2)
    write_model(repository / "second", "YZ", amount=10)
    write_version(repository / "second", 2, "YZ", amount=20)
    write_version(repository / "second", 3, "YZ", amount=30, initialize="raise RuntimeError('never to be loaded')")
    with (repository / "second" / "config.pbtxt").open("a") as file:
        file.write("version_policy { specific { versions: [1, 2] } }\n")
    (repository / "chain" / "1").mkdir(parents=True)
    configuration = CONFIGURATION.format(name="chain", kind='platform: "ensemble"', input="X", output="Z")
    (repository / "chain" / "config.pbtxt").write_text(configuration + STEPS)
    return repository


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    repository = write_chain(tmp_path_factory.mktemp("repository"))
    with TritonServer(repository, log_file=tmp_path_factory.mktemp("log") / "triton.log", stop_timeout=3) as server:
        yield server


def infer(server: TritonServer, model: str = "chain", tensors: str = "XZ", version: str = "") -> float:
    value = grpcclient.InferInput(tensors[0], [1], "FP32")
    value.set_data_from_numpy(np.zeros(1, dtype=np.float32))
    with contextlib.closing(grpcclient.InferenceServerClient(server.grpc_url)) as client:
        answer = client.infer(model, [value], model_version=version, client_timeout=PATIENCE_SECONDS)
        return float(answer.as_numpy(tensors[1])[0])


def await_true(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def is_served(server: TritonServer, times: int = 6) -> bool:
    """Whether as many requests in a row succeed as it takes to meet every instance of a model."""
    try:
        return all(infer(server) == 21 for _ in range(times))
    except grpcclient.InferenceServerException:
        return False


def living_stubs(server: TritonServer, model: str, version: str | None = None) -> list[psutil.Process]:
    found = []
    for process in psutil.Process(server.process_id).children():
        with contextlib.suppress(psutil.Error):
            stub = parse_stub(process.cmdline())
            if stub is not None and stub.model.name == model and version in (None, stub.model.version):
                found.append(process)
    return found


def has_ended(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    return True


def leftovers() -> set[str]:
    """What servers of this process have in /dev/shm, in the temporary directory, and running."""
    shared = {str(path) for path in Path("/dev/shm").glob(f"liber_{os.getpid()}_*")}
    temporary = {str(path) for path in Path(tempfile.gettempdir()).glob(f"liber-triton-{os.getpid()}-*")}
    return shared | temporary | {str(child.pid) for child in psutil.Process().children(recursive=True)}


class TestStartAndStop:
    def test_it_serves_and_leaves_nothing(self, tmp_path: Path) -> None:
        before = leftovers()
        repository = write_chain(tmp_path / "repository")
        # No ensemble has it as a step.
        write_model(repository / "alone", "XY", initialize="raise RuntimeError('never to be loaded')")
        with TritonServer(repository, log_file=tmp_path / "triton.log") as server:
            assert infer(server) == 21
            assert infer(server, "second", "YZ", version="1") == 10
            processes = psutil.Process(server.process_id).children()
            assert len(processes) == 4
            assert len(leftovers() - before) == 4 + 1 + 1 + 4  # shared memory, directory, server, its models
        assert leftovers() == before
        assert not any(process.is_running() for process in processes)
        assert not server.is_alive
        assert server.process_id is None

    def test_it_can_be_started_again_but_not_twice(self, tmp_path: Path) -> None:
        write_model(tmp_path / "first", "XY")
        server = TritonServer(tmp_path, log_file=tmp_path / "triton.log", stop_timeout=3)
        for _ in range(2):
            with server:
                assert infer(server, "first", "XY") == 1
                with pytest.raises(ServerError, match="already started"):
                    server.start()
                assert server.is_alive

    def test_only_the_models_asked_for(self, tmp_path: Path) -> None:
        repository = write_chain(tmp_path / "repository")
        with TritonServer(repository, log_file=tmp_path / "triton.log", models=["first"], stop_timeout=3) as server:
            assert infer(server, "first", "XY") == 1
            assert not living_stubs(server, "second")
            server.load_model("chain")
            assert infer(server) == 21

    def test_the_environment_reaches_the_models(self, tmp_path: Path) -> None:
        initialize = "import os; assert os.environ['LIBER_TEST'] == 'yes' and os.environ['OMP_NUM_THREADS'] == '3'"
        write_model(tmp_path / "first", "XY", initialize=initialize)
        environment = {"LIBER_TEST": "yes", "OMP_NUM_THREADS": "3"}
        with TritonServer(
            tmp_path, log_file=tmp_path / "triton.log", environment=environment, stop_timeout=3
        ) as server:
            assert infer(server, "first", "XY") == 1

    def test_a_port_lost_at_the_last_moment_is_replaced(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_model(tmp_path / "first", "XY")
        with socket.create_server(("127.0.0.1", 0)) as taken:
            lost = [{"grpc": taken.getsockname()[1]}]
            monkeypatch.setattr(
                "liber_runtime.server.find_ports",
                lambda hosts, requested: find_ports(hosts, requested) | (lost.pop() if lost else {}),
            )
            with TritonServer(tmp_path, log_file=tmp_path / "triton.log", stop_timeout=3) as server:
                assert not lost
                assert infer(server, "first", "XY") == 1


class TestRefusals:
    def test_a_port_in_use(self, tmp_path: Path) -> None:
        write_model(tmp_path / "first", "XY")
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            server = TritonServer(tmp_path, log_file=tmp_path / "triton.log", http_port=port)
            with pytest.raises(ConfigurationError, match=f"http port {port} on 127.0.0.1 is already in use"):
                server.start()
        assert not server.is_alive

    def test_numpy_2(self, tmp_path: Path) -> None:
        before = leftovers()
        write_model(tmp_path / "models" / "first", "XY")
        venv.create(tmp_path / "venv", symlinks=True)
        (site,) = (tmp_path / "venv" / "lib").glob("python3.*/site-packages")
        (site / "numpy-2.1.0.dist-info").mkdir()
        (site / "numpy-2.1.0.dist-info" / "METADATA").write_text("Name: numpy\nVersion: 2.1.0\n")
        python = tmp_path / "venv" / "bin" / "python3"
        with pytest.raises(ConfigurationError, match=r"numpy 2\.1\.0 in .*pip install 'numpy<2'"):
            TritonServer(tmp_path / "models", log_file=tmp_path / "triton.log", python=python).start()
        assert leftovers() == before

    def test_modules_where_it_was_started_are_not_its_models(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_model(tmp_path / "models" / "first", "XY", initialize="import json; json.dumps(1)")
        (tmp_path / "json.py").write_text("raise RuntimeError('not this one')\n")
        monkeypatch.chdir(tmp_path)
        with TritonServer(Path("models"), log_file=Path("triton.log"), stop_timeout=3) as server:
            assert infer(server, "first", "XY") == 1

    def test_a_model_that_does_not_load(self, tmp_path: Path) -> None:
        before = leftovers()
        repository, log = write_chain(tmp_path / "repository"), tmp_path / "triton.log"
        (repository / "first" / "1" / "model.py").write_text("import a_package_nobody_has\n")
        with pytest.raises(ServerError) as refused:
            TritonServer(repository, log_file=log).start()
        assert str(refused.value) == (
            f"model 'first' did not load: ModuleNotFoundError: No module named 'a_package_nobody_has' (log: {log})"
        )
        assert leftovers() == before

    def test_models_for_another_triton(self, tmp_path: Path) -> None:
        if (find_tritonserver().backends / "onnxruntime").is_dir():
            pytest.skip("this Triton runs ONNX graphs by itself")
        repository = write_chain(tmp_path / "repository")
        path = repository / "second" / "config.pbtxt"
        path.write_text(path.read_text().replace('backend: "python"', 'platform: "onnxruntime_onnx"'))
        with pytest.raises(ConfigurationError, match=r"is for target gpu: second run .* serves target cpu; serve"):
            TritonServer(repository, log_file=tmp_path / "triton.log").start()
        assert not (tmp_path / "triton.log").exists()

    def test_models_that_take_too_long(self, tmp_path: Path) -> None:
        before = leftovers()
        write_model(tmp_path / "first", "XY", initialize="import time; time.sleep(60)")
        server = TritonServer(tmp_path, log_file=tmp_path / "triton.log", start_timeout=1, stop_timeout=1)
        with pytest.raises(ServerError, match=r"had not loaded its models after 1 s.*start_timeout"):
            server.start()
        assert leftovers() == before


class TestLoading:
    def test_a_reload_is_no_crash(self, chain: TritonServer) -> None:
        restarts = chain.stub_restarts
        before = living_stubs(chain, "first") + living_stubs(chain, "second")
        chain.reload_model("first")
        chain.reload_model("second")
        await_true(lambda: all(has_ended(process) for process in before))
        assert is_served(chain)
        time.sleep(0.5)  # long enough for several looks of the supervisor
        assert chain.stub_restarts == restarts

    def test_an_unload_is_no_crash(self, chain: TritonServer) -> None:
        restarts = chain.stub_restarts
        with contextlib.closing(grpcclient.InferenceServerClient(chain.grpc_url)) as client:
            client.unload_model("first")
        await_true(lambda: not living_stubs(chain, "first"))
        time.sleep(0.5)
        assert not living_stubs(chain, "first")
        chain.load_model("chain")
        assert is_served(chain)
        assert chain.stub_restarts == restarts

    def test_a_failed_load_says_why_and_leaves_the_old_one(self, chain: TritonServer) -> None:
        restarts = chain.stub_restarts
        file = chain.repository / "second" / "2" / "model.py"
        good = file.read_text()
        file.write_text(MODEL.format(input="Y", output="Z", amount=0, initialize="raise KeyError('bundle')"))
        with pytest.raises(ServerError, match=r"second.*KeyError: 'bundle'") as refused:
            chain.load_model("second")
        assert "\n" not in str(refused.value)
        assert is_served(chain)
        time.sleep(0.5)
        assert chain.stub_restarts == restarts
        file.write_text(good)
        chain.load_model("second")
        assert is_served(chain)

    def test_a_repository_that_cannot_be_written_is_reloaded_too(
        self, chain: TritonServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = {stub.pid for stub in living_stubs(chain, "first")}

        def refuse(path: Path) -> None:
            raise PermissionError(path)

        monkeypatch.setattr(os, "utime", refuse)
        chain.reload_model("first")
        assert is_served(chain)
        assert {stub.pid for stub in living_stubs(chain, "first")} - before


class TestHealing:
    @pytest.mark.parametrize(("model", "version"), [("first", "1"), ("second", "1"), ("second", "2")])
    def test_a_model_of_an_ensemble_whose_process_died(self, chain: TritonServer, model: str, version: str) -> None:
        restarts, server = chain.stub_restarts, chain.process_id
        living_stubs(chain, model, version)[-1].kill()
        await_true(lambda: chain.stub_restarts > restarts and is_served(chain))
        assert chain.stub_restarts == restarts + 1
        assert infer(chain, "second", "YZ", version="1") == 10
        assert chain.process_id == server
        assert chain.server_restarts == 0

    def test_all_processes_of_a_model_at_once_and_again(self, chain: TritonServer) -> None:
        for restarts in (chain.stub_restarts, chain.stub_restarts + 2):
            for stub in living_stubs(chain, "first"):
                stub.kill()
            await_true(lambda: chain.stub_restarts > restarts and is_served(chain))  # noqa: B023
            assert chain.stub_restarts == restarts + 2

    def test_a_replacement_that_hangs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        flag = tmp_path / "hang"
        initialize = f"import os, time; os.path.exists('{flag}') and (os.remove('{flag}'), time.sleep(600))"
        write_model(tmp_path / "first", "XY", initialize=initialize)
        monkeypatch.setattr("liber_runtime.server.supervisor._HEAL_SECONDS", 0.5)
        with TritonServer(tmp_path, log_file=tmp_path / "triton.log", stop_timeout=1) as server:
            flag.touch()
            living_stubs(server, "first")[0].kill()
            await_true(lambda: server.server_restarts == 1)
            assert not flag.exists()
            assert infer(server, "first", "XY") == 1

    def test_a_model_that_ends_its_own_process(self, tmp_path: Path) -> None:
        write_model(tmp_path / "first", "XY")
        file = tmp_path / "first" / "1" / "model.py"
        file.write_text(file.read_text().replace("return [", "import os; os._exit(0)\n        return ["))
        with TritonServer(tmp_path, log_file=tmp_path / "triton.log", stop_timeout=1) as server:
            with pytest.raises(grpcclient.InferenceServerException, match="not healthy"):
                infer(server, "first", "XY")
            await_true(lambda: server.stub_restarts == 1)

    def test_the_server(self, tmp_path: Path) -> None:
        before = leftovers()
        repository = write_chain(tmp_path / "repository")
        with TritonServer(repository, log_file=tmp_path / "triton.log", stop_timeout=3) as server:
            url, killed = server.grpc_url, server.process_id
            assert killed is not None
            os.kill(killed, signal.SIGKILL)
            await_true(lambda: server.server_restarts == 1)
            assert is_served(server)
            assert server.grpc_url == url
            assert server.process_id != killed
            assert server.stub_restarts == 0
            living_stubs(server, "first")[0].kill()
            await_true(lambda: server.stub_restarts == 1 and is_served(server))
        assert leftovers() == before

    def test_a_server_that_cannot_be_started_again_is_given_up(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = leftovers()
        write_model(tmp_path / "first", "XY")
        monkeypatch.setattr("liber_runtime.server.supervisor._MOST_SERVER_DEATHS", 2)
        with TritonServer(tmp_path, log_file=tmp_path / "triton.log", stop_timeout=1) as server:
            (tmp_path / "first" / "1" / "model.py").write_text("raise RuntimeError('gone bad')\n")
            assert server.process_id is not None
            os.kill(server.process_id, signal.SIGKILL)
            with pytest.raises(ServerError, match=r"ended with exit status .*, 3 times within 60 s: giving up"):
                server.wait()
            assert leftovers() == before


SERVE = """
import sys
from pathlib import Path
from liber_runtime.exceptions import LiberError
from liber_runtime.server import TritonServer, run_until_signalled

try:
    server = TritonServer(Path(sys.argv[1]), log_file=Path(sys.argv[2]), stop_timeout=3)
    run_until_signalled(server, lambda ready: print(ready.process_id, flush=True))
except LiberError as error:
    sys.exit(str(error))
print("stopped", flush=True)
"""


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    write_model(tmp_path / "repository" / "first", "XY")
    (tmp_path / "temporary").mkdir()
    command = [sys.executable, "-c", SERVE, str(tmp_path / "repository"), str(tmp_path / "triton.log")]
    environment = {**os.environ, "TMPDIR": str(tmp_path / "temporary")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        yield process
        process.kill()


class TestTheProcessAroundIt:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_stops_it_cleanly(
        self, serving: subprocess.Popen[str], tmp_path: Path, number: signal.Signals
    ) -> None:
        assert serving.stdout is not None
        server = psutil.Process(int(serving.stdout.readline()))
        serving.send_signal(number)
        assert serving.stdout.readline() == "stopped\n"
        assert serving.wait(PATIENCE_SECONDS) == 0
        assert not server.is_running()
        assert not list((tmp_path / "temporary").iterdir())
        assert not list(Path("/dev/shm").glob(f"liber_{serving.pid}_*"))

    def test_a_signal_stops_it_while_it_starts(self, serving: subprocess.Popen[str], tmp_path: Path) -> None:
        assert serving.stdout is not None
        await_true(lambda: bool(list((tmp_path / "temporary").iterdir())))
        serving.send_signal(signal.SIGTERM)
        assert "stopped\n" in serving.stdout.readlines()
        assert serving.wait(PATIENCE_SECONDS) == 0
        assert not list((tmp_path / "temporary").iterdir())

    def test_it_dies_with_the_process(self, serving: subprocess.Popen[str]) -> None:
        assert serving.stdout is not None
        server = psutil.Process(int(serving.stdout.readline()))
        processes = [server, *server.children()]
        assert len(processes) == 2
        serving.kill()
        _, left = psutil.wait_procs(processes, timeout=PATIENCE_SECONDS)
        assert not left
        assert not list(Path("/dev/shm").glob(f"liber_{serving.pid}_*"))

    def test_the_next_start_ends_what_a_killed_process_left(
        self, serving: subprocess.Popen[str], tmp_path: Path
    ) -> None:
        assert serving.stdout is not None
        server = psutil.Process(int(serving.stdout.readline()))
        (stub,) = server.children()
        # A stopped stub stands for one that hangs in an answer: neither ends by itself when its server is gone.
        stub.suspend()
        serving.kill()
        server.kill()
        serving.wait()
        await_true(lambda: has_ended(server))
        assert not has_ended(stub)
        with TritonServer(tmp_path / "repository", log_file=tmp_path / "next.log", stop_timeout=3) as following:
            assert following.is_alive
            assert has_ended(stub)
            assert not list(Path("/dev/shm").glob(f"liber_{serving.pid}_*"))
