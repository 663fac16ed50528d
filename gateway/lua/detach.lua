-- A connection is gone: its device's field goes, unless a newer connection holds it; with the last field the user is offline.
-- KEYS: connection:{user}, presence:{user}. ARGV: device, instance id, connection id, offline Presence JSON, presence TTL s.
-- Returns 1 when the user went offline.
local value = redis.call('HGET', KEYS[1], ARGV[1])
if value then
  local entry = cjson.decode(value)
  if entry.instance_id ~= ARGV[2] or entry.connection_id ~= ARGV[3] then
    return 0
  end
  redis.call('HDEL', KEYS[1], ARGV[1])
end
if redis.call('EXISTS', KEYS[1]) == 1 then
  return 0
end
redis.call('SET', KEYS[2], ARGV[4], 'EX', ARGV[5])
redis.call('PUBLISH', KEYS[2], ARGV[4])
return 1
