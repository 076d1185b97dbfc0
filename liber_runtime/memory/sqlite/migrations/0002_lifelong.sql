-- Vectors of several encodings side by side, erasing of single behaviors, and marks of logs.
--
-- event_digest(text) is a function that the store gives to the connection.

-- An encoding is an encoder with its PCA. `wanted`: every partition gets its vector. 0 in other tables is any encoding.
CREATE TABLE encodings (
    encoding    INTEGER PRIMARY KEY,
    fingerprint TEXT NOT NULL UNIQUE,
    wanted      INTEGER NOT NULL DEFAULT 0,
    vectors     INTEGER NOT NULL DEFAULT 0
) STRICT;

INSERT INTO encodings (fingerprint, vectors) SELECT fingerprint, count(*) FROM representations GROUP BY fingerprint;

-- A user's vectors of one encoding lie side by side, the newest last.
CREATE TABLE vectors (
    user     INTEGER NOT NULL REFERENCES users ON DELETE CASCADE,
    encoding INTEGER NOT NULL REFERENCES encodings,
    number   INTEGER NOT NULL,
    vector   BLOB NOT NULL,
    PRIMARY KEY (user, encoding, number)
) STRICT, WITHOUT ROWID;

INSERT INTO vectors
    SELECT r.user, e.encoding, r.number, r.vector FROM representations r JOIN encodings e USING (fingerprint);

DROP TABLE representations;
ALTER TABLE vectors RENAME TO representations;

-- Digests instead of ids: of equal length, and what stays of an erased behavior tells nothing of it.
CREATE TABLE digests (
    user   INTEGER NOT NULL REFERENCES users ON DELETE CASCADE,
    digest BLOB NOT NULL,
    PRIMARY KEY (user, digest)
) STRICT, WITHOUT ROWID;

INSERT INTO digests SELECT user, event_digest(event_id) FROM events;
DROP TABLE events;
ALTER TABLE digests RENAME TO events;

ALTER TABLE users ADD COLUMN behaviors INTEGER NOT NULL DEFAULT 0;
UPDATE users SET behaviors = (SELECT count(*) FROM events WHERE events.user = users.user);

CREATE TABLE open_steps (
    user     INTEGER NOT NULL REFERENCES users ON DELETE CASCADE,
    number   INTEGER NOT NULL,
    step     TEXT NOT NULL CHECK (step IN ('summary', 'shift', 'representation')),
    encoding INTEGER NOT NULL DEFAULT 0,
    due      REAL,
    claim    TEXT,
    attempts INTEGER NOT NULL DEFAULT 0,
    error    TEXT,
    PRIMARY KEY (user, number, step, encoding)
) STRICT, WITHOUT ROWID;

INSERT INTO open_steps SELECT user, number, step, 0, due, claim, attempts, error FROM steps;
DROP TABLE steps;
ALTER TABLE open_steps RENAME TO steps;
CREATE INDEX steps_by_due ON steps (step, encoding, due, user, number);

-- How far a log has been read; see liber_runtime.memory.Mark.
CREATE TABLE marks (
    source   TEXT PRIMARY KEY,
    position INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
