-- Append: the client has partitioned what it believes the cache to be; here that is checked and kept, or refused.

-- keys: user, steps, events, bucket, registry, dead, summary queue
-- args: user id, token of this append, revision that the client saw, behaviors, their digests (16 bytes each), cache,
--       arrival, partitions...
-- Returns 1 if it is kept (now, or by an earlier try of this very append), else what is there: revision, partitions,
-- cache, and for each digest '1' if it is known.
local function append(keys, args)
  local at = {user = keys[1], steps = keys[2], events = keys[3], bucket = keys[4], registry = keys[5], dead = keys[6],
              summary = keys[7], id = args[1]}
  local token, expected, kept, digests = args[2], args[3], tonumber(args[4]), args[5]
  local held = call('HMGET', at.user, 'revision', 'cut', 'kept')
  local revision, cut = held[1] or '', tonumber(held[2] or 0)
  if revision == token then return 1 end

  local batches, known, any_known = {}, {}, false
  for first = 1, kept, 1000 do
    local batch = {}
    for index = first, math.min(first + 999, kept) do
      batch[#batch + 1] = string.sub(digests, 16 * index - 15, 16 * index)
    end
    batches[#batches + 1] = batch
    if revision ~= '' then
      for _, is_known in ipairs(call('SMISMEMBER', at.events, unpack(batch))) do
        known[#known + 1] = is_known
        any_known = any_known or is_known == 1
      end
    end
  end
  if any_known or revision ~= expected then
    return {revision, cut, call('HGET', at.user, 'cache') or '', table.concat(known)}
  end

  for _, batch in ipairs(batches) do call('SADD', at.events, unpack(batch)) end
  local partitions = #args - 7
  for index = 1, partitions do
    call('HSET', at.user, 'p' .. (cut + index), args[7 + index])
    enqueue(at, 'summary', cut + index, '')
  end
  local had = tonumber(held[3] or 0)
  call('HSET', at.user, 'revision', token, 'cut', cut + partitions, 'kept', had + kept, 'cache', args[6])
  if partitions > 0 then call('HSET', at.user, 'last', for_scoring(args[#args])) end
  if had == 0 then
    count(at, 'users', 1)
    call('ZADD', at.registry, 'NX', args[7], at.id)
  end
  count(at, 'behaviors', kept)
  count(at, 'partitions', partitions)
  return 1
end

-- keys: user, registry; args: user id, profile, arrival
local function describe(keys, args)
  call('HSET', keys[1], 'profile', args[2])
  return call('ZADD', keys[2], 'NX', args[3], args[1])
end

-- keys: settings; args: name, value if there is none yet, ... Returns the values that hold.
local function agree(keys, args)
  local held = {}
  for index = 1, #args, 2 do
    call('HSETNX', keys[1], args[index], args[index + 1])
    held[#held + 1] = call('HGET', keys[1], args[index])
  end
  return held
end

-- keys: marks; args: source, position. Marks never go back.
local function mark(keys, args)
  if tonumber(args[2]) > tonumber(call('HGET', keys[1], args[1]) or 0) then call('HSET', keys[1], args[1], args[2]) end
  return 1
end

register('append', append)
register('describe', describe)
register('agree', agree)
register('mark', mark)
