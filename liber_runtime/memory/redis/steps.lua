-- What the other files build on: where a user's data lies, and the steps that its partitions still need.
--
-- A user's keys share one slot with the keys of the user's bucket:
--   user      hash: profile, revision, cut (partitions), kept (behaviors), cache; p<j>, s<j>, c<j> are partition j, its
--             summary and its shift; last: what scoring needs of the last partition; encodings: fingerprints of the
--             vectors there are, one a line
--   steps     hash: "<step> <j> <fingerprint>" -> "<entry> <generation>", or "dead"
--   events    set of digests of event ids
--   vectors   sorted set for each fingerprint: score j, member 4 bytes j and float32[d]
-- and of a bucket:
--   bucket    hash: counters; wanted, known: fingerprints, one a line; generation of these settings
--   registry  sorted set of the users, by arrival
--   dead      hash: "<step>\n<j>\n<fingerprint>\n<user>" -> "<attempts>\n<error>"
--   queues    a stream for each kind of step; its one consumer group holds who has claimed what
--
-- A run of behaviors is: how many, bytes of their item ids (uint32 each), item ids, feedback, timestamps, event ids; so
-- what scoring needs of it lies at its beginning.
--
-- When an entry may be claimed (again) is written as its time of delivery, HORIZON earlier: so "idle for HORIZON" is
-- "due". Its count of deliveries is the attempts.

local GROUP, CONSUMER = 'workers', 'worker'
local HORIZON = 365 * 86400 * 1000

-- While a library is loaded there is no redis.call to give a shorter name to.
local function call(...)
  return redis.call(...)
end

local function server_time()
  local time = call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Milliseconds: the caller's if it brings its own clock, else the server's.
local function now(clock)
  return clock == '' and server_time() or tonumber(clock)
end

local function whole(number)
  return string.format('%.0f', number)
end

local function each_line(joined)
  return string.gmatch(joined or '', '[^\n]+')
end

local function has_line(joined, line)
  return string.find('\n' .. (joined or '') .. '\n', '\n' .. line .. '\n', 1, true) ~= nil
end

-- The keys of one user, as `Keys.place` in keys.py lists them, and the index of the first argument after the place.
local function place(keys, args)
  local at = {user = keys[1], steps = keys[2], events = keys[3], bucket = keys[4], registry = keys[5], dead = keys[6],
              summary = keys[7], shift = keys[8], representation = {}, vectors = {}, encodings = {}, id = args[1]}
  local count = tonumber(args[2])
  for index = 1, count do
    local fingerprint = args[2 + index]
    at.encodings[index] = fingerprint
    at.representation[fingerprint] = keys[7 + 2 * index]
    at.vectors[fingerprint] = keys[8 + 2 * index]
  end
  at.wanted = call('HGET', at.bucket, 'wanted') or ''
  return at, count + 3
end

-- Encodings of the bucket whose keys the caller did not declare; it must call again with them.
local function undeclared(at)
  local known = call('HGET', at.bucket, 'known')
  for fingerprint in each_line(known) do
    if not at.vectors[fingerprint] then return {'UNDECLARED', known} end
  end
  return nil
end

local function count(at, what, change)
  if change ~= 0 then call('HINCRBY', at.bucket, what, change) end
end

local function queue_of(at, step, fingerprint)
  if step == 'representation' then return at.representation[fingerprint] end
  return at[step]
end

local function field_of(step, number, fingerprint)
  return step .. ' ' .. number .. ' ' .. fingerprint
end

local function dead_field(at, step, number, fingerprint)
  return step .. '\n' .. number .. '\n' .. fingerprint .. '\n' .. at.id
end

-- Takes a step off, wherever it is; a claim on it is void.
local function close(at, step, number, fingerprint)
  local field = field_of(step, number, fingerprint)
  local held = call('HGET', at.steps, field)
  if not held then return end
  call('HDEL', at.steps, field)
  if held == 'dead' then
    call('HDEL', at.dead, dead_field(at, step, number, fingerprint))
    count(at, 'dead ' .. step, -1)
  else
    local queue, entry = queue_of(at, step, fingerprint), string.match(held, '^%S+')
    call('XACK', queue, GROUP, entry)
    call('XDEL', queue, entry)
    count(at, 'pending ' .. step, -1)
  end
end

-- Makes a new step ready.
local function enqueue(at, step, number, fingerprint)
  local queue = queue_of(at, step, fingerprint)
  if call('EXISTS', queue) == 0 then call('XGROUP', 'CREATE', queue, GROUP, '0', 'MKSTREAM') end
  local entry = call('XADD', queue, '*', 'u', at.id, 'n', number)
  call('HSET', at.steps, field_of(step, number, fingerprint), entry .. ' 0')
  count(at, 'pending ' .. step, 1)
end

-- Makes a step ready, anew if it is open already: its inputs are no longer those that a claim was made on.
local function open(at, step, number, fingerprint)
  close(at, step, number, fingerprint)
  enqueue(at, step, number, fingerprint)
end

local function is_open(at, step, number)
  return call('HEXISTS', at.steps, field_of(step, number, '')) == 1
end

local function close_representations(at, number)
  for _, fingerprint in ipairs(at.encodings) do close(at, 'representation', number, fingerprint) end
end

local function for_scoring(run)
  local behaviors, ids = struct.unpack('<I4I4', run)
  return string.sub(run, 1, 8 + ids + 8 * behaviors)
end

local function has(at, kind, number)
  return call('HEXISTS', at.user, kind .. number) == 1
end

-- A run without behaviors is its header of 8 bytes alone.
local function has_behaviors(at, number)
  return call('HSTRLEN', at.user, 'p' .. number) > 8
end

local function needs_shift(at, number)
  return number > 1 and has_behaviors(at, number - 1)
end

-- Queues the vectors of a partition whose texts are there, unless one of them is about to be replaced.
local function open_representations(at, number)
  if is_open(at, 'summary', number) or is_open(at, 'shift', number) then return end
  if at.wanted == '' then return open(at, 'representation', number, '') end
  for fingerprint in each_line(at.wanted) do open(at, 'representation', number, fingerprint) end
end

-- The vectors of a shift's partition wait for it.
local function open_shift(at, number)
  open(at, 'shift', number, '')
  close_representations(at, number)
end

-- Steps that would read the old summary go.
local function open_summary(at, number)
  open(at, 'summary', number, '')
  close(at, 'shift', number, '')
  close_representations(at, number)
  close(at, 'shift', number + 1, '')
end

-- What a new summary lets be made (paper, section 3.3.2: the cascade).
local function after_summary(at, number)
  if not needs_shift(at, number) then open_representations(at, number) end
  for each = number, number + 1 do
    if needs_shift(at, each) and has(at, 's', each - 1) and has(at, 's', each)
       and not is_open(at, 'summary', each - 1) and not is_open(at, 'summary', each) then
      open_shift(at, each)
    end
  end
end

-- The user's list of encodings loses one of which there are no more vectors.
local function unlist(at, fingerprint)
  local left = {}
  for each in each_line(call('HGET', at.user, 'encodings')) do
    if each ~= fingerprint then left[#left + 1] = each end
  end
  call('HSET', at.user, 'encodings', table.concat(left, '\n'))
end

-- Deletes the vectors of one partition.
local function drop_vectors(at, number)
  for _, fingerprint in ipairs(at.encodings) do
    if fingerprint ~= '' then
      local dropped = call('ZREMRANGEBYSCORE', at.vectors[fingerprint], number, number)
      count(at, 'vectors ' .. fingerprint, -dropped)
      if dropped > 0 and call('EXISTS', at.vectors[fingerprint]) == 0 then unlist(at, fingerprint) end
    end
  end
end
