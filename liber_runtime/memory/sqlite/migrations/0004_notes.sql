-- What of a text is not as it should be: behaviors that its prompt left out, an answer that was cut off.
ALTER TABLE texts ADD COLUMN note TEXT NOT NULL DEFAULT '';
