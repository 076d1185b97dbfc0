-- Claims and what becomes of them.

-- Entries idle for this long are due. A client with its own clock writes its own times; the server counts by its own.
local function idle_when_due(clock)
  return clock == '' and HORIZON or server_time() - tonumber(clock) + HORIZON
end

local function postpone(queue, entry, due, attempts)
  call('XCLAIM', queue, GROUP, CONSUMER, '0', entry, 'TIME', whole(math.max(0, due - HORIZON)),
       'RETRYCOUNT', attempts, 'JUSTID')
end

-- How many steps of a bucket can be claimed now, at most `limit`.
-- keys: bucket, queues...; args: clock, limit, the step of each queue...
local function ready(keys, args)
  local idle, limit, found = whole(idle_when_due(args[1])), tonumber(args[2]), 0
  for index = 2, #keys do
    if found < limit and tonumber(call('HGET', keys[1], 'pending ' .. args[index + 1]) or 0) > 0
       and call('EXISTS', keys[index]) == 1 then
      found = found + #call('XPENDING', keys[index], GROUP, 'IDLE', idle, '-', '+', limit - found)
      if found < limit then
        local group = call('XINFO', 'GROUPS', keys[index])[1]
        for at = 1, #group, 2 do
          if group[at] == 'last-delivered-id' then
            found = found + #call('XRANGE', keys[index], '(' .. group[at + 1], '+', 'COUNT', limit - found)
          end
        end
      end
    end
  end
  return found
end

-- Claims up to `limit` steps of a bucket, those given back or left behind first.
-- keys: bucket, queues...; args: clock, limit, lease in ms, the step of each queue...
-- Returns queue, entry, attempts, user id and number for each.
local function claim(keys, args)
  local clock, limit, lease = args[1], tonumber(args[2]), tonumber(args[3])
  local due, idle, taken = now(clock) + lease, whole(idle_when_due(clock)), {}

  local function take(index, entries, attempts_of)
    for _, entry in ipairs(entries) do
      local attempts = attempts_of(entry[1])
      postpone(keys[index], entry[1], due, attempts)
      if attempts > 1 and args[index + 2] ~= 'representation' then call('HINCRBY', keys[1], 'repeated', 1) end
      taken[#taken + 1] = {index - 1, entry[1], attempts, entry[2][2], tonumber(entry[2][4])}
    end
  end

  for index = 2, #keys do
    local queue = keys[index]
    if #taken < limit and call('EXISTS', queue) == 1 then
      local cursor = '0-0'
      repeat
        local found = call('XAUTOCLAIM', queue, GROUP, CONSUMER, idle, cursor, 'COUNT', limit - #taken)
        cursor = found[1]
        take(index, found[2], function(entry) return call('XPENDING', queue, GROUP, entry, entry, 1)[1][4] end)
      until cursor == '0-0' or #taken >= limit
      if #taken < limit then
        local fresh = call('XREADGROUP', 'GROUP', GROUP, CONSUMER, 'COUNT', limit - #taken, 'STREAMS', queue, '>')
        if fresh then take(index, fresh[1][2], function() return 1 end) end
      end
    end
  end
  return taken
end

-- What a claimed step reads, or nothing if it is no longer wanted; first what the steps hash holds of it.
-- keys: user, steps; args: step, number, fingerprint
local function inputs(keys, args)
  local step, number = args[1], tonumber(args[2])
  local held = call('HGET', keys[2], field_of(step, number, args[3]))
  if not held or held == 'dead' then return false end
  local fields = {'s' .. number, 'c' .. number}
  if step == 'summary' then fields = {'profile', 'p' .. number} end
  if step == 'shift' then fields = {'s' .. (number - 1), 's' .. number} end
  local values = call('HMGET', keys[1], unpack(fields))
  return {held, values[1] or '', values[2] or ''}
end

-- The attempts of a claim if it is still held. A claim is entry, generation and attempts.
local function attempts_if_held(at, step, number, fingerprint, entry, generation, attempts)
  if call('HGET', at.steps, field_of(step, number, fingerprint)) ~= entry .. ' ' .. generation then return nil end
  local pending = call('XPENDING', queue_of(at, step, fingerprint), GROUP, entry, entry, 1)[1]
  return pending and pending[4] == tonumber(attempts) and pending[4] or nil
end

-- args: place, step, number, fingerprint, entry, generation, attempts, clock, lease in ms. Returns 1 if it is held.
local function renew(keys, args)
  local at, next = place(keys, args)
  local step, number, fingerprint, entry, generation, attempts, clock, lease = unpack(args, next)
  local held = attempts_if_held(at, step, tonumber(number), fingerprint, entry, generation, attempts)
  if not held then return 0 end
  postpone(queue_of(at, step, fingerprint), entry, now(clock) + tonumber(lease), held)
  return 1
end

local function keep_vector(at, number, fingerprint, vector)
  local key = at.vectors[fingerprint]
  local replaced = call('ZREMRANGEBYSCORE', key, number, number)
  call('ZADD', key, number, struct.pack('>I4', number) .. vector)
  count(at, 'vectors ' .. fingerprint, 1 - replaced)
  local encodings = call('HGET', at.user, 'encodings') or ''
  if not has_line(encodings, fingerprint) then
    call('HSET', at.user, 'encodings', encodings == '' and fingerprint or encodings .. '\n' .. fingerprint)
  end
  local known = call('HGET', at.bucket, 'known') or ''
  if not has_line(known, fingerprint) then
    call('HSET', at.bucket, 'known', known == '' and fingerprint or known .. '\n' .. fingerprint)
  end
end

local function bury(at, step, number, fingerprint, attempts, reason)
  close(at, step, number, fingerprint)
  call('HSET', at.steps, field_of(step, number, fingerprint), 'dead')
  call('HSET', at.dead, dead_field(at, step, number, fingerprint), attempts .. '\n' .. reason)
  count(at, 'dead ' .. step, 1)
end

-- args: place, step, number, fingerprint, entry, generation, attempts, clock, then
--   'text', record | 'vector', fingerprint, float32[d] | 'retry', after ms, 1 if it was an attempt | 'dead', reason
-- Returns 1 if the claim was held, else 0 and nothing is kept.
local function commit(keys, args)
  local at, next = place(keys, args)
  local step, number, fingerprint, entry, generation, attempts, clock, kind, first, second = unpack(args, next)
  number = tonumber(number)
  local missing = undeclared(at)
  if missing then return missing end
  local held = attempts_if_held(at, step, number, fingerprint, entry, generation, attempts)
  if not held then return 0 end
  if kind == 'dead' then
    bury(at, step, number, fingerprint, held, first)
  elseif kind == 'retry' then
    call('HSET', at.steps, field_of(step, number, fingerprint), entry .. ' ' .. (generation + 1))
    local left = second == '1' and held or held - 1
    postpone(queue_of(at, step, fingerprint), entry, now(clock) + tonumber(first), left)
  else
    close(at, step, number, fingerprint)
    if kind == 'vector' then
      keep_vector(at, number, first, second)
    elseif step == 'summary' then
      call('HSET', at.user, 's' .. number, first)
      after_summary(at, number)
    else
      call('HSET', at.user, 'c' .. number, first)
      open_representations(at, number)
    end
  end
  return 1
end

-- args: place, step, number, fingerprint. Returns 1 if the step was dead.
local function revive(keys, args)
  local at, next = place(keys, args)
  local step, number, fingerprint = unpack(args, next)
  if call('HGET', at.steps, field_of(step, number, fingerprint)) ~= 'dead' then return 0 end
  open(at, step, number, fingerprint)
  return 1
end

register('ready', ready, {'no-writes'})
register('claim', claim)
register('inputs', inputs, {'no-writes'})
register('renew', renew)
register('commit', commit)
register('revive', revive)
