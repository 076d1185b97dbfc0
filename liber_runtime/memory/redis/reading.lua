-- What scoring needs of a user, and all that is held of one.

local function size_of(run)
  return struct.unpack('<I4', run)
end

-- keys: user, vectors, bucket; args: history, newest vectors, fingerprint
-- Returns profile, runs (newest first), members of the sorted set (newest first), foreign fingerprints; nothing for an
-- unknown user.
local function read(keys, args)
  local held = call('HMGET', keys[1], 'profile', 'cut', 'cache', 'encodings')
  if not held[1] and not held[2] then return false end
  local left, cut, runs, number = tonumber(args[1]), tonumber(held[2] or 0), {}, nil
  number = cut
  if held[3] and left > 0 then
    runs[1] = for_scoring(held[3])
    left = left - size_of(held[3])
  end
  while left > 0 and number > 0 do
    local run = call('HGET', keys[1], 'p' .. number)
    runs[#runs + 1] = for_scoring(run)
    left, number = left - size_of(run), number - 1
  end

  local newest, members, foreign = tonumber(args[2]), {}, ''
  if newest > 0 and cut > 0 then
    members = call('ZRANGE', keys[2], 0, newest - 1, 'REV')
    if #members == 0 and not has_line(call('HGET', keys[3], 'wanted'), args[3]) then foreign = held[4] or '' end
  end
  return {held[1] or '', table.concat(runs), members, foreign}
end

-- args: place, first, last. Returns revision, partitions, profile, cache and for each partition asked for run, summary,
-- shift; then for each encoding its vectors (members of the sorted set).
local function timeline(keys, args)
  local at, next = place(keys, args)
  local missing = undeclared(at)
  if missing then return missing end
  local held = call('HMGET', at.user, 'revision', 'cut', 'profile', 'cache')
  if not held[2] and not held[3] then return false end
  local first, last = args[next], math.min(tonumber(args[next + 1]), tonumber(held[2] or 0))
  local rows, vectors = {}, {}
  for number = tonumber(first), last do
    rows[#rows + 1] = call('HMGET', at.user, 'p' .. number, 's' .. number, 'c' .. number)
  end
  for index, fingerprint in ipairs(at.encodings) do
    vectors[index] = fingerprint == '' and {} or call('ZRANGEBYSCORE', at.vectors[fingerprint], first, last)
  end
  return {held[1] or '', tonumber(held[2] or 0), held[3] or '', held[4] or '', rows, at.encodings, vectors}
end

register('read', read, {'no-writes'})
register('timeline', timeline, {'no-writes'})
