-- Statistics that cost the same however long the queue is: when each step became ready, and counts kept by triggers.

-- When a step became ready, or was last made so anew; claims and retries leave it alone. NULL is a dead step. Of steps
-- from before this version it is when they were last due.
ALTER TABLE steps ADD COLUMN since REAL;
UPDATE steps SET since = min(due, (julianday('now') - 2440587.5) * 86400.0) WHERE due IS NOT NULL;
CREATE INDEX steps_by_since ON steps (step, since);

INSERT INTO counters VALUES ('items', (SELECT count(*) FROM items));
INSERT INTO counters
    SELECT state || ' ' || kind, (SELECT count(*) FROM steps WHERE step = kind AND (since IS NULL) = (state = 'dead'))
    FROM (SELECT 'pending' AS state UNION ALL SELECT 'dead'),
         (SELECT 'summary' AS kind UNION ALL SELECT 'shift' UNION ALL SELECT 'representation');

-- Items are replaced and never deleted.
CREATE TRIGGER new_item AFTER INSERT ON items BEGIN
    UPDATE counters SET value = value + 1 WHERE name = 'items';
END;

CREATE TRIGGER new_step AFTER INSERT ON steps BEGIN
    UPDATE counters SET value = value + 1
    WHERE name = iif(new.since IS NULL, 'dead ', 'pending ') || new.step;
END;

CREATE TRIGGER deleted_step AFTER DELETE ON steps BEGIN
    UPDATE counters SET value = value - 1
    WHERE name = iif(old.since IS NULL, 'dead ', 'pending ') || old.step;
END;

CREATE TRIGGER changed_step AFTER UPDATE OF since ON steps WHEN (old.since IS NULL) <> (new.since IS NULL) BEGIN
    UPDATE counters SET value = value - 1
    WHERE name = iif(old.since IS NULL, 'dead ', 'pending ') || old.step;
    UPDATE counters SET value = value + 1
    WHERE name = iif(new.since IS NULL, 'dead ', 'pending ') || new.step;
END;
