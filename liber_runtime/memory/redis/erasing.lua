-- Erases a user, or one behavior with all that was made from it. Erasing must work when memory is full.

-- args: place. Returns behaviors and partitions.
local function forget(keys, args)
  local at = place(keys, args)
  local missing = undeclared(at)
  if missing then return missing end
  local held = call('HMGET', at.user, 'kept', 'cut')
  local kept, cut = tonumber(held[1] or 0), tonumber(held[2] or 0)
  for _, field in ipairs(call('HKEYS', at.steps)) do
    local step, number, fingerprint = string.match(field, '^(%a+) (%d+) (.*)$')
    close(at, step, tonumber(number), fingerprint)
  end
  for _, fingerprint in ipairs(at.encodings) do
    if fingerprint ~= '' then
      count(at, 'vectors ' .. fingerprint, -call('ZCARD', at.vectors[fingerprint]))
      call('UNLINK', at.vectors[fingerprint])
    end
  end
  call('UNLINK', at.user, at.steps, at.events)
  call('ZREM', at.registry, at.id)
  count(at, 'users', kept > 0 and -1 or 0)
  count(at, 'behaviors', -kept)
  count(at, 'partitions', -cut)
  return {kept, cut}
end

-- Where a behavior lies. keys: user, events; args: event id, its digest, first, last
-- Returns revision, partitions, then 0 and the cache, or the number and the run of its partition, if it is there.
local function find(keys, args)
  local held = call('HMGET', keys[1], 'revision', 'cut', 'cache')
  local revision, cut = held[1] or '', tonumber(held[2] or 0)
  if call('SISMEMBER', keys[2], args[2]) == 0 then return {revision, 0} end

  local function holds(run)
    local behaviors, ids = struct.unpack('<I4I4', run)
    return has_line(string.sub(run, 9 + ids + 16 * behaviors), args[1])
  end

  if held[3] and holds(held[3]) then return {revision, cut, 0, held[3]} end
  for number = tonumber(args[3]), math.min(tonumber(args[4]), cut) do
    local run = call('HGET', keys[1], 'p' .. number)
    if holds(run) then return {revision, cut, number, run} end
  end
  return {revision, cut}
end

-- args: place, token, revision that the caller saw, number (0: the cache), the run without the behavior
-- Returns 1, or 0 if the user has changed meanwhile.
local function erase(keys, args)
  local at, next = place(keys, args)
  local token, expected, number, run = unpack(args, next)
  local missing, revision = undeclared(at), call('HGET', at.user, 'revision')
  if missing then return missing end
  if revision == token then return 1 end
  if revision ~= expected then return 0 end
  number = tonumber(number)
  call('HSET', at.user, 'revision', token, number == 0 and 'cache' or 'p' .. number, run)
  count(at, 'behaviors', -1)
  if call('HINCRBY', at.user, 'kept', -1) == 0 then count(at, 'users', -1) end
  if number == 0 then return 1 end
  if number == tonumber(call('HGET', at.user, 'cut')) then call('HSET', at.user, 'last', for_scoring(run)) end
  call('HDEL', at.user, 's' .. number, 'c' .. number, 'c' .. (number + 1))
  for each = number, number + 1 do
    drop_vectors(at, each)
    close(at, 'shift', each, '')
    close_representations(at, each)
  end
  close(at, 'summary', number, '')
  if has_behaviors(at, number) then
    open_summary(at, number)
  elseif has(at, 's', number + 1) then
    open_representations(at, number + 1)
  end
  return 1
end

register('forget', forget, {'allow-oom'})
register('find', find, {'no-writes'})
register('erase', erase, {'allow-oom'})
