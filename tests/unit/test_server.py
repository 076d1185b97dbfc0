from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from liber_runtime.exceptions import ConfigurationError
from liber_runtime.server import TritonServer, find_tritonserver
from liber_runtime.server.control import explain_failure, find_taken_port, shorten_reason
from liber_runtime.server.installation import (
    StubPython,
    TritonInstallation,
    inspect_python,
    prepare_backends,
    server_environment,
)
from liber_runtime.server.process import find_ports
from liber_runtime.server.stubs import ModelVersion, Stub, expected_stubs, find_broken, parse_stub
from liber_runtime.server.supervisor import Backoff

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="Triton runs on Linux")


def make_executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def make_environment(directory: Path, *distributions: str) -> Path:
    """A virtual environment of the running Python with nothing but the metadata of these distributions."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    site = directory / "lib" / f"python{version}" / "site-packages"
    site.mkdir(parents=True)
    (directory / "bin").mkdir()
    (directory / "bin" / "python3").symlink_to(Path(sys.executable).resolve())
    (directory / "pyvenv.cfg").write_text(
        f"home = {Path(sys.executable).resolve().parent}\ninclude-system-site-packages = false\n"
    )
    for distribution in distributions:
        name, number = distribution.split("==")
        (site / f"{name}-{number}.dist-info").mkdir()
        (site / f"{name}-{number}.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: {number}\n")
    return directory / "bin" / "python3"


class TestFindingTriton:
    def test_prefers_the_one_on_path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        binary = make_executable(tmp_path / "bin" / "tritonserver", "#!/bin/sh\n")
        (tmp_path / "backends" / "python").mkdir(parents=True)
        monkeypatch.setenv("PATH", str(binary.parent))
        assert find_tritonserver() == TritonInstallation(binary, tmp_path / "backends", tmp_path / "caches")

    def test_says_how_to_get_one(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr("liber_runtime.server.installation._SYSTEM_BINARY", tmp_path / "tritonserver")
        monkeypatch.setattr(sys, "path", [])
        with pytest.raises(ConfigurationError, match=r"pip install 'liber-runtime\[serve\]'"):
            find_tritonserver()

    @LINUX
    def test_does_not_import_pytriton(self) -> None:
        code = (
            "import sys; from liber_runtime.server import find_tritonserver; found = find_tritonserver(); "
            "print(found.binary.is_file(), 'pytriton' in sys.modules)"
        )
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert ran.stdout.split() == ["True", "False"]


class TestThePythonOfTheModels:
    def inspect(self, python: Path) -> StubPython:
        return inspect_python(server_environment(python, {"PATH": "", "PYTHONPATH": ""}))

    @LINUX
    def test_an_old_numpy_is_accepted(self, tmp_path: Path) -> None:
        python = make_environment(tmp_path, "numpy==1.26.4")
        found = self.inspect(python)
        assert found.executable == python
        assert found.version == f"{sys.version_info.major}.{sys.version_info.minor}"

    @pytest.mark.parametrize("version", ["2.0.0", "2.4.6", "10.1"])
    def test_numpy_2_is_refused(self, tmp_path: Path, version: str) -> None:
        python = make_environment(tmp_path, f"numpy=={version}")
        with pytest.raises(
            ConfigurationError, match=f"numpy {version} in {python}.*-m pip install 'numpy<2'"
        ) as refused:
            self.inspect(python)
        assert "\n" not in str(refused.value)

    def test_no_numpy_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match="no numpy"):
            self.inspect(make_environment(tmp_path))

    def test_a_numpy_in_the_working_directory_is_not_the_models(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        python = make_environment(tmp_path / "environment")
        (tmp_path / "numpy-1.26.4.dist-info").mkdir()
        (tmp_path / "numpy-1.26.4.dist-info" / "METADATA").write_text("Name: numpy\nVersion: 1.26.4\n")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ConfigurationError, match="no numpy"):
            self.inspect(python)

    def test_a_missing_library_is_named(self, tmp_path: Path) -> None:
        answer = '{"version": "3.11", "library_directory": null, "numpy": "1.26.4"}'
        python = make_executable(tmp_path / "python3", f"#!/bin/sh\necho '{answer}'\n")
        with pytest.raises(ConfigurationError, match=r"libpython3\.11\.so\.1\.0.*--enable-shared"):
            self.inspect(python)

    def test_a_broken_interpreter_is_named(self, tmp_path: Path) -> None:
        python = make_executable(tmp_path / "python3", "#!/bin/sh\necho 'first line\nsegfault' >&2\nexit 3\n")
        with pytest.raises(ConfigurationError, match=rf"{python} does not run \(exit status 3\): segfault"):
            self.inspect(python)

    def test_no_interpreter_at_all(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match="no python3 on the server's PATH"):
            self.inspect(tmp_path / "python3")


class TestTheEnvironment:
    def test_the_models_python_comes_first(self) -> None:
        environment = server_environment(Path("/models/bin/python"), {"PATH": "/usr/bin"})
        assert environment["PATH"] == f"/models/bin{os.pathsep}/usr/bin"

    def test_one_thread_each_unless_asked_for_more(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        assert server_environment(Path("python"), {})["OMP_NUM_THREADS"] == "1"
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        assert server_environment(Path("python"), {})["OMP_NUM_THREADS"] == "2"
        assert server_environment(Path("python"), {"OMP_NUM_THREADS": "3"})["OMP_NUM_THREADS"] == "3"


class TestTheStubProgram:
    def test_the_wheels_stub_is_joined_to_the_backend(self, tmp_path: Path) -> None:
        wheel = tmp_path / "wheel"
        for file in (
            "backends/python/libtriton_python.so",
            "backends/python/triton_python_backend_utils.py",
            "stubs/3.11/triton_python_backend_stub",
        ):
            make_executable(wheel / file, file)
        (tmp_path / "runtime").mkdir()
        installation = TritonInstallation(wheel / "tritonserver", wheel / "backends", wheel / "caches", wheel / "stubs")
        backends = prepare_backends(installation, StubPython(Path("python3"), "3.11", None), tmp_path / "runtime")
        assert {file.name: file.read_text() for file in (backends / "python").iterdir()} == {
            "libtriton_python.so": "backends/python/libtriton_python.so",
            "triton_python_backend_utils.py": "backends/python/triton_python_backend_utils.py",
            "triton_python_backend_stub": "stubs/3.11/triton_python_backend_stub",
        }

    def test_a_python_without_a_stub_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "stubs" / "3.11").mkdir(parents=True)
        installation = TritonInstallation(tmp_path, tmp_path, tmp_path, tmp_path / "stubs")
        with pytest.raises(ConfigurationError, match=r"Python 3\.14, for which .* no stub \(it has 3\.11\)"):
            prepare_backends(installation, StubPython(Path("python3"), "3.14", None), tmp_path)

    def test_the_systems_stub_must_run_the_same_python(self, tmp_path: Path) -> None:
        stub = tmp_path / "python" / "triton_python_backend_stub"
        installation = TritonInstallation(tmp_path, tmp_path, tmp_path)
        python = StubPython(Path("python3"), "3.12", None)
        with pytest.raises(ConfigurationError, match="missing or not linked"):
            prepare_backends(installation, python, tmp_path)
        make_executable(stub, "\0libpython3.10.so.1.0\0")
        with pytest.raises(ConfigurationError, match=r"runs Python 3\.10"):
            prepare_backends(installation, python, tmp_path)
        make_executable(stub, "\0libpython3.12.so.1.0\0")
        assert prepare_backends(installation, python, tmp_path) == tmp_path


class TestPorts:
    def test_free_ones_are_found_and_differ(self) -> None:
        found = find_ports(
            dict.fromkeys(("http", "grpc", "metrics"), "127.0.0.1"), {"http": 0, "grpc": 0, "metrics": 0}
        )
        assert list(found) == ["http", "grpc", "metrics"]
        assert len({*found.values(), 0}) == 4

    def test_one_in_use_is_named_with_the_way_out(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(ConfigurationError, match=f"grpc port {port} on 127.0.0.1 is already in use.*grpc_port"):
                find_ports({"http": "127.0.0.1", "grpc": "127.0.0.1"}, {"http": 0, "grpc": port})

    def test_an_address_of_another_machine_is_refused(self) -> None:
        with pytest.raises(ConfigurationError, match=r"http port 0 on 192\.0\.2\.1 cannot be used"):
            find_ports({"http": "192.0.2.1"}, {"http": 0})


class TestTheRepository:
    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match=f"no model repository at {tmp_path}/none: run `liber build`"):
            TritonServer(tmp_path / "none", log_file=tmp_path / "log").start()

    def test_without_models(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        with pytest.raises(ConfigurationError, match="holds no models"):
            TritonServer(tmp_path, log_file=tmp_path / "log").start()

    def test_without_the_model_asked_for(self, tmp_path: Path) -> None:
        (tmp_path / "liber_score").mkdir()
        (tmp_path / "liber_score" / "config.pbtxt").touch()
        with pytest.raises(ConfigurationError, match=r"no model 'liber_encode' in .*; it has liber_score"):
            TritonServer(tmp_path, log_file=tmp_path / "log", models=["liber_encode"]).start()

    def test_what_never_started_can_be_stopped_and_waited_for(self, tmp_path: Path) -> None:
        server = TritonServer(tmp_path, log_file=tmp_path / "log")
        server.stop()
        server.wait()
        assert not server.is_alive
        assert (server.process_id, server.stub_restarts, server.server_restarts) == (None, 0, 0)


LOG_OF_A_MODEL_THAT_RAISES = r"""
E1121 01:57:25.112 6476 server.cc:241] "CudaDriverHelper has not been initialized."
E1121 01:57:25.455 6476 backend_model.cc:692] "ERROR: Failed to create instance: RuntimeError: no \"vocabulary\"\n\nAt:\n"
E1121 01:57:25.456 6476 model_lifecycle.cc:642] "failed to load 'first' version 1: Internal: RuntimeError: no \"vocabulary\"\nrun liber build\n\nAt:\n  /repo/first/1/model.py(6): initialize\n"
E1121 01:57:25.457 6476 model_repository_manager.cc:703] "Invalid argument: ensemble 'chain' depends on 'first' which has no loaded version. Model 'first' loading failed with error: version 1 is at UNAVAILABLE state: Internal: RuntimeError;"
"""  # noqa: E501
LOG_OF_A_BROKEN_CONFIGURATION = r"""
[libprotobuf ERROR text_format.cc:337] Error parsing text-format inference.ModelConfig: 8:9: Message type "inference.ModelConfig" has no field named "nonsense".
E1121 01:57:35.204 6700 model_repository_manager.cc:1460] "Poll failed for model directory 'first': failed to read text proto from /repo/first/config.pbtxt"
E1121 01:57:35.205 6700 model_repository_manager.cc:703] "Invalid argument: ensemble chain contains models that are not available or ambiguous: first"
"""  # noqa: E501
LOG_OF_A_BROKEN_ENSEMBLE = r"""
E1121 01:57:42.515 6862 model_repository_manager.cc:703] "Invalid argument: in ensemble chain, ensemble tensor mid: inconsistent data type: TYPE_FP32 is inferred from model first while TYPE_INT64 is inferred from model second"
"""  # noqa: E501
LOG_OF_A_TAKEN_PORT = r"""
E1121 01:58:48.729 7094 main.cc:257] "failed to start HTTP service: Unavailable - Socket '127.0.0.1:18100' already in use "
"""  # noqa: E501


class TestReasons:
    @pytest.mark.parametrize(
        ("log", "reason"),
        [
            (LOG_OF_A_MODEL_THAT_RAISES, "model 'first' did not load: RuntimeError: no \"vocabulary\" run liber build"),
            (
                LOG_OF_A_BROKEN_CONFIGURATION,
                "model 'first' did not load: failed to read text proto from /repo/first/config.pbtxt: "
                '8:9: Message type "inference.ModelConfig" has no field named "nonsense".',
            ),
            (
                LOG_OF_A_BROKEN_ENSEMBLE,
                "model 'chain' did not load: in ensemble chain, ensemble tensor mid: inconsistent data type: TYPE_FP32 "
                "is inferred from model first while TYPE_INT64 is inferred from model second",
            ),
            (LOG_OF_A_TAKEN_PORT, None),
        ],
    )
    def test_the_one_that_helps_is_found(self, log: str, reason: str | None) -> None:
        assert explain_failure(log) == reason

    def test_a_repository_of_another_version_is_told(self) -> None:
        log = (
            "E0101 model_lifecycle.cc:642] \"failed to load 'user_memory' version 1: Internal: ImportError: "
            "cannot import name 'Counter' from 'liber_runtime.served.backend' (/x/backend.py)\""
        )
        assert str(explain_failure(log)).endswith(
            "another version of LIBER published this repository: publish the bundle again"
        )

    def test_a_taken_port_is_found(self) -> None:
        assert find_taken_port(LOG_OF_A_TAKEN_PORT) == 18100
        assert find_taken_port(LOG_OF_A_MODEL_THAT_RAISES) is None

    @given(st.text())
    def test_it_is_one_bounded_line(self, text: str) -> None:
        reason = shorten_reason(text)
        assert len(reason.splitlines()) <= 1
        assert len(reason) <= 300


COMMAND_LINE = [
    *(
        "/tmp/x/python/triton_python_backend_stub",
        "/repo/ctr_backbone/3/model.py",
        "liber_1_a_",
        "16777216",
        "16777216",
    ),
    *("77", "/tmp/x/python", "336", "ctr_backbone_0_1", "DEFAULT"),
]

stubs = st.builds(
    Stub, st.builds(ModelVersion, st.sampled_from("ab"), st.sampled_from("12")), st.sampled_from(["i_0", "i_1"])
)


class TestStubs:
    def test_a_command_line_tells_what_it_runs(self) -> None:
        assert parse_stub(COMMAND_LINE) == Stub(ModelVersion("ctr_backbone", "3"), "ctr_backbone_0_1")

    @pytest.mark.parametrize(
        "command_line", [[], ["tritonserver", *COMMAND_LINE[1:]], COMMAND_LINE[:4]], ids=["zombie", "server", "other"]
    )
    def test_any_other_process_is_none(self, command_line: list[str]) -> None:
        assert parse_stub(command_line) is None

    def test_a_configuration_tells_how_many(self) -> None:
        model = ModelVersion("m", "1")
        groups = [
            {"name": "m_0", "count": 2, "kind": "KIND_CPU", "gpus": []},
            {"name": "m_1", "count": 1, "kind": "KIND_GPU", "gpus": [0, 1]},
        ]
        assert expected_stubs(model, {"backend": "python", "instance_group": groups}) == {
            Stub(model, "m_0_0"): 1,
            Stub(model, "m_0_1"): 1,
            Stub(model, "m_1_0"): 2,
        }
        assert not expected_stubs(model, {"backend": "onnxruntime", "instance_group": groups})
        assert not expected_stubs(model, {"backend": "", "platform": "ensemble"})

    @given(st.lists(stubs), st.lists(stubs))
    def test_more_than_expected_is_not_broken(self, expected: list[Stub], more: list[Stub]) -> None:
        assert not find_broken(Counter(expected), expected + more)

    @given(st.lists(stubs, min_size=1), st.data())
    def test_each_missing_one_is_counted(self, expected: list[Stub], data: st.DataObject) -> None:
        lost = data.draw(st.sampled_from(expected))
        living = list(expected)
        living.remove(lost)
        assert find_broken(Counter(expected), living) == {lost.model: 1}


class TestBackoff:
    @given(st.integers(1, 200))
    def test_delays_grow_up_to_the_longest(self, failures: int) -> None:
        backoff = Backoff(window=60, longest=8)
        delays = []
        for _ in range(failures):
            backoff.record(100.0)
            delays.append(backoff.delay)
        assert delays[:6] == [0, 0.5, 1, 2, 4, 8][:failures]
        assert delays == sorted(delays)
        assert max(delays) <= 8

    def test_a_quiet_window_forgets(self) -> None:
        backoff = Backoff(window=60, longest=8)
        assert [backoff.record(now) for now in (0, 1, 2)] == [1, 2, 3]
        assert backoff.record(61.5) == 2
        assert backoff.record(200) == 1
        assert backoff.delay == 0
