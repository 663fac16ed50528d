-- The user's connections on one instance are still there: lifetimes are renewed, and what Redis has forgotten is written again.
-- KEYS: connection:{user}, presence:{user}, users:{instance}.
-- ARGV: Presence JSON, connection TTL s, presence TTL s, user, then device, ConnectionRegistry JSON, ...
-- A field that names another connection is left alone: that one is newer. Who was taken for gone is announced again.
local gone = redis.call('EXISTS', KEYS[1]) == 0
for i = 5, #ARGV, 2 do
  redis.call('HSETNX', KEYS[1], ARGV[i], ARGV[i + 1])
end
redis.call('EXPIRE', KEYS[1], ARGV[2])
redis.call('SADD', KEYS[3], ARGV[4])
redis.call('EXPIRE', KEYS[3], ARGV[2])
redis.call('SET', KEYS[2], ARGV[1], 'EX', ARGV[3])
if gone then
  redis.call('PUBLISH', KEYS[2], ARGV[1])
end
return 1
