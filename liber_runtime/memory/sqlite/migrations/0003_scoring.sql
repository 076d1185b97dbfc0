-- What scoring reads of a user, in one row each, so that a score touches a few pages however many partitions there are.
-- Both tables are copies. A row that is missing is made when the user's next partition is cut or next vector comes;
-- until then what it is a copy of is read. The triggers see to it that no copy is older than that.

-- The newest behaviors of a user's partitions, up to the partition of a number; `complete` if they are all.
CREATE TABLE newest_behaviors (
    user     INTEGER PRIMARY KEY REFERENCES users ON DELETE CASCADE,
    number   INTEGER NOT NULL,
    complete INTEGER NOT NULL,
    item_ids TEXT NOT NULL,
    feedback BLOB NOT NULL
) STRICT;

CREATE TRIGGER changed_partition AFTER UPDATE ON partitions BEGIN
    DELETE FROM newest_behaviors WHERE user = old.user;
END;

CREATE TRIGGER deleted_partition AFTER DELETE ON partitions BEGIN
    DELETE FROM newest_behaviors WHERE user = old.user;
END;

-- The newest vectors of a user and an encoding, one after another, the newest last. A rowid table, for the rows are
-- long: a clustered one would read whole rows to compare keys.
CREATE TABLE newest_vectors (
    user     INTEGER NOT NULL REFERENCES users ON DELETE CASCADE,
    encoding INTEGER NOT NULL REFERENCES encodings,
    count    INTEGER NOT NULL,
    vectors  BLOB NOT NULL,
    PRIMARY KEY (user, encoding)
) STRICT;

CREATE TRIGGER new_representation AFTER INSERT ON representations BEGIN
    DELETE FROM newest_vectors WHERE user = new.user AND encoding = new.encoding;
END;

CREATE TRIGGER changed_representation AFTER UPDATE ON representations BEGIN
    DELETE FROM newest_vectors WHERE user = old.user AND encoding = old.encoding;
END;

CREATE TRIGGER deleted_representation AFTER DELETE ON representations BEGIN
    DELETE FROM newest_vectors WHERE user = old.user AND encoding = old.encoding;
END;
