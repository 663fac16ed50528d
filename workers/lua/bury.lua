-- An instance is dead: a part of its users is taken off it, and with the last of them everything that was its own goes.
-- KEYS: instance:{id}, users:{id}, down:{id}, instances, seen, then connection:{user} and presence:{user} of each user.
-- ARGV: instance id, offline Presence JSON, what is published of it, presence TTL s, epoch ms, then the users.
-- Whoever has a connection elsewhere stays. Returns -1 when the instance lives after all, else how many users are left.
if redis.call('EXISTS', KEYS[1]) == 1 then
  return -1
end
for i = 6, #ARGV do
  local connections, presence = KEYS[2 * i - 6], KEYS[2 * i - 5]
  if redis.call('SREM', KEYS[2], ARGV[i]) == 1 then
    local fields = redis.call('HGETALL', connections)
    for f = 1, #fields, 2 do
      local readable, entry = pcall(cjson.decode, fields[f + 1])
      if not readable or entry.instance_id == ARGV[1] then
        redis.call('HDEL', connections, fields[f])
      end
    end
    if redis.call('EXISTS', connections) == 0 then
      redis.call('SET', presence, ARGV[2], 'EX', ARGV[4])
      redis.call('PUBLISH', presence, ARGV[3])
      redis.call('ZADD', KEYS[5], ARGV[5], ARGV[i])
    end
  end
end
local left = redis.call('SCARD', KEYS[2])
if left == 0 then
  redis.call('DEL', KEYS[2], KEYS[3])
  redis.call('SREM', KEYS[4], ARGV[1])
end
return left
