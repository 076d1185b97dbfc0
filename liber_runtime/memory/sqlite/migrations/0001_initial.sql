-- One file holds everything. A user is a small number in every table, so that keys stay short.
--
-- Runs of behaviors are columns packed into one row (ids joined by line feeds, which no id can hold; little-endian
-- float64): a partition never changes and is always used whole, and scoring then reads two rows, not twenty.

CREATE TABLE settings (
    name  TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT, WITHOUT ROWID;

-- Totals, so that statistics cost the same for any number of users; and how many users were forgotten since the file
-- was last rewritten.
CREATE TABLE counters (
    name  TEXT PRIMARY KEY,
    value INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

INSERT INTO counters VALUES ('users', 0), ('behaviors', 0), ('partitions', 0), ('repeated', 0), ('unscrubbed', 0);

CREATE TABLE items (
    item_id    TEXT PRIMARY KEY,
    title      TEXT NOT NULL,
    attributes TEXT NOT NULL
) STRICT, WITHOUT ROWID;

-- With the short-term cache in the user's own row: one look-up gives scoring the profile and the newest behaviors.
CREATE TABLE users (
    user       INTEGER PRIMARY KEY,
    user_id    TEXT NOT NULL UNIQUE,
    profile    TEXT NOT NULL DEFAULT '',
    partitions INTEGER NOT NULL DEFAULT 0,
    item_ids   TEXT NOT NULL DEFAULT '',
    feedback   BLOB NOT NULL DEFAULT x'',
    timestamps BLOB NOT NULL DEFAULT x'',
    event_ids  TEXT NOT NULL DEFAULT ''
) STRICT;

-- What makes a repeated delivery count once.
CREATE TABLE events (
    user     INTEGER NOT NULL REFERENCES users ON DELETE CASCADE,
    event_id TEXT NOT NULL,
    PRIMARY KEY (user, event_id)
) STRICT, WITHOUT ROWID;

-- Long rows: a rowid table appends them at the end of the file, where a clustered one would split pages.
CREATE TABLE partitions (
    user       INTEGER NOT NULL REFERENCES users ON DELETE CASCADE,
    number     INTEGER NOT NULL,
    item_ids   TEXT NOT NULL,
    feedback   BLOB NOT NULL,
    timestamps BLOB NOT NULL,
    event_ids  TEXT NOT NULL,
    PRIMARY KEY (user, number)
) STRICT;

CREATE TABLE texts (
    user            INTEGER NOT NULL REFERENCES users ON DELETE CASCADE,
    number          INTEGER NOT NULL,
    kind            TEXT NOT NULL CHECK (kind IN ('summary', 'shift')),
    text            TEXT NOT NULL,
    writer          TEXT NOT NULL,
    prompt_version  TEXT NOT NULL,
    prompt_tokens   INTEGER,
    response_tokens INTEGER,
    seconds         REAL NOT NULL,
    made_at         REAL NOT NULL,
    PRIMARY KEY (user, number, kind)
) STRICT;

-- Short rows, clustered: a user's newest vectors lie side by side.
CREATE TABLE representations (
    user        INTEGER NOT NULL REFERENCES users ON DELETE CASCADE,
    number      INTEGER NOT NULL,
    vector      BLOB NOT NULL,
    fingerprint TEXT NOT NULL,
    PRIMARY KEY (user, number)
) STRICT, WITHOUT ROWID;

-- What is still to be made. `due` is when anyone may claim the step: when it arose, when it may be tried again or
-- when the claim on it expires; NULL is never, a dead step.
CREATE TABLE steps (
    user     INTEGER NOT NULL REFERENCES users ON DELETE CASCADE,
    number   INTEGER NOT NULL,
    step     TEXT NOT NULL CHECK (step IN ('summary', 'shift', 'representation')),
    due      REAL,
    claim    TEXT,
    attempts INTEGER NOT NULL DEFAULT 0,
    error    TEXT,
    PRIMARY KEY (user, number, step)
) STRICT, WITHOUT ROWID;

CREATE INDEX steps_by_due ON steps (step, due, user, number);
