-- A device is connected: the newest connection wins.
-- KEYS: connection:{user}, presence:{user}, users:{instance}, seen.
-- ARGV: device, ConnectionRegistry JSON, Presence JSON, connection TTL s, presence TTL s, user, epoch ms, limit of seen.
-- Returns the ConnectionRegistry JSON that this one replaces, or nil.
local previous = redis.call('HGET', KEYS[1], ARGV[1])
if redis.call('HLEN', KEYS[1]) == 0 and redis.call('ZCARD', KEYS[4]) < tonumber(ARGV[8]) then
  redis.call('ZADD', KEYS[4], ARGV[7], ARGV[6])
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('EXPIRE', KEYS[1], ARGV[4])
redis.call('SADD', KEYS[3], ARGV[6])
redis.call('EXPIRE', KEYS[3], ARGV[4])
redis.call('SET', KEYS[2], ARGV[3], 'EX', ARGV[5])
redis.call('PUBLISH', KEYS[2], ARGV[3])
return previous
