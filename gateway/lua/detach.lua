-- A connection is gone: its device's field goes, unless a newer connection holds it; with the last field the user is offline.
-- KEYS: connection:{user}, presence:{user}, users:{instance}, seen.
-- ARGV: device, instance id, connection id, offline Presence JSON, presence TTL s, user, epoch ms, limit of seen.
-- Returns 1 when the user went offline.
local value = redis.call('HGET', KEYS[1], ARGV[1])
if value then
  local entry = cjson.decode(value)
  if entry.instance_id == ARGV[2] and entry.connection_id == ARGV[3] then
    redis.call('HDEL', KEYS[1], ARGV[1])
  end
end
local left = redis.call('HVALS', KEYS[1])
local here = false
for _, other in ipairs(left) do
  here = here or cjson.decode(other).instance_id == ARGV[2]
end
if not here then
  redis.call('SREM', KEYS[3], ARGV[6])
end
if #left > 0 then
  return 0
end
if redis.call('ZCARD', KEYS[4]) < tonumber(ARGV[8]) then
  redis.call('ZADD', KEYS[4], ARGV[7], ARGV[6])
end
redis.call('SET', KEYS[2], ARGV[4], 'EX', ARGV[5])
redis.call('PUBLISH', KEYS[2], ARGV[4])
return 1
