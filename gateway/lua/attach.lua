-- A device is connected: the newest connection wins.
-- KEYS: connection:{user}, presence:{user}. ARGV: device, ConnectionRegistry JSON, Presence JSON, connection TTL s, presence TTL s.
-- Returns the ConnectionRegistry JSON that this one replaces, or nil.
local previous = redis.call('HGET', KEYS[1], ARGV[1])
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('EXPIRE', KEYS[1], ARGV[4])
redis.call('SET', KEYS[2], ARGV[3], 'EX', ARGV[5])
redis.call('PUBLISH', KEYS[2], ARGV[3])
return previous
