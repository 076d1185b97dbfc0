-- Makes texts or vectors again, over a range of a user's partitions: a long history must not hold up the server.

-- Queues the texts of one user that match.
-- args: place, writer, prompt version (empty: any), first, last. Returns how many were queued.
local function rewrite(keys, args)
  local at, next = place(keys, args)
  local writer, version, first, last = unpack(args, next)
  local missing, queued = undeclared(at), 0
  if missing then return missing end
  last = math.min(tonumber(last), tonumber(call('HGET', at.user, 'cut') or 0))

  local function matches(kind, number)
    local record = call('HGET', at.user, kind .. number)
    if not record then return false end
    local text = cjson.decode(record)
    return (writer == '' or text[2] == writer) and (version == '' or text[3] == version)
  end

  for number = tonumber(first), last do
    if matches('s', number) then
      open_summary(at, number)
      queued = queued + 1
    end
  end
  for number = tonumber(first), last do
    -- A summary that is made again brings its shifts with it.
    if matches('c', number) and not is_open(at, 'summary', number) and not is_open(at, 'summary', number - 1) then
      open_shift(at, number)
      queued = queued + 1
    end
  end
  return queued
end

-- The settings of the store. keys: settings; args: wanted fingerprints, one a line
-- Returns the number of this change, and what was wanted before it ('*': anything). A change that was not finished can
-- be repeated: before it is then still what was wanted before its first try.
local function change(keys, args)
  local held = call('HMGET', keys[1], 'wanted', 'before', 'generation', 'finished')
  local before = held[1] or '*'
  if held[1] == args[1] and held[4] ~= held[3] then before = held[2] end
  local generation = tonumber(held[3] or 0) + 1
  call('HSET', keys[1], 'wanted', args[1], 'before', before, 'generation', generation)
  return {generation, before}
end

-- keys: settings; args: number of the change that is complete
local function finish(keys, args)
  return call('HSET', keys[1], 'finished', args[1])
end

-- The settings of a bucket. keys: bucket; args: generation, wanted, known. An older generation changes nothing.
local function want(keys, args)
  if tonumber(args[1]) < tonumber(call('HGET', keys[1], 'generation') or 0) then return 0 end
  local known = args[3]
  for fingerprint in each_line(call('HGET', keys[1], 'known')) do
    if not has_line(known, fingerprint) then known = known == '' and fingerprint or known .. '\n' .. fingerprint end
  end
  call('HSET', keys[1], 'generation', args[1], 'wanted', args[2], 'known', known)
  return known
end

local function has_vector(at, number, fingerprint)
  if fingerprint ~= '' then return call('ZCOUNT', at.vectors[fingerprint], number, number) > 0 end
  for _, each in ipairs(at.encodings) do
    if each ~= '' and call('ZCOUNT', at.vectors[each], number, number) > 0 then return true end
  end
  return false
end

local function drop_encoding(at, fingerprint)
  count(at, 'vectors ' .. fingerprint, -call('ZCARD', at.vectors[fingerprint]))
  call('UNLINK', at.vectors[fingerprint])
  unlist(at, fingerprint)
end

-- Takes off one user's steps for vectors that are not wanted and deletes the outdated vectors; once per user.
-- args: place, outdated fingerprints, one a line
local function unencode(keys, args)
  local at, next = place(keys, args)
  local missing = undeclared(at)
  if missing then return missing end
  local fields = call('HKEYS', at.steps)
  for _, field in ipairs(fields) do
    local number, fingerprint = string.match(field, '^representation (%d+) (.*)$')
    local wanted = at.wanted == '' and fingerprint == '' or has_line(at.wanted, fingerprint or '')
    if number and not wanted then close(at, 'representation', tonumber(number), fingerprint) end
  end
  for fingerprint in each_line(args[next]) do
    -- Wanted again since: someone else has changed the settings meanwhile.
    if at.vectors[fingerprint] and not has_line(at.wanted, fingerprint) and call('EXISTS', at.vectors[fingerprint]) == 1
    then drop_encoding(at, fingerprint) end
  end
  return 0
end

-- Queues the vectors that a user lacks of the wanted encodings. args: place, first, last. Returns how many.
local function encode(keys, args)
  local at, next = place(keys, args)
  local missing, queued = undeclared(at), 0
  if missing then return missing end
  local last = math.min(tonumber(args[next + 1]), tonumber(call('HGET', at.user, 'cut') or 0))
  local wanted = {}
  for fingerprint in each_line(at.wanted) do wanted[#wanted + 1] = fingerprint end
  if #wanted == 0 then wanted = {''} end
  for number = tonumber(args[next]), last do
    if has(at, 's', number) and (has(at, 'c', number) or not needs_shift(at, number))
       and not is_open(at, 'summary', number) and not is_open(at, 'shift', number) then
      for _, fingerprint in ipairs(wanted) do
        if call('HEXISTS', at.steps, field_of('representation', number, fingerprint)) == 0
           and not has_vector(at, number, fingerprint) then
          open(at, 'representation', number, fingerprint)
          queued = queued + 1
        end
      end
    end
  end
  return queued
end

register('rewrite', rewrite)
register('change', change)
register('finish', finish)
register('want', want)
register('unencode', unencode)
register('encode', encode)
