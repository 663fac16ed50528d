-- The user's connections on one instance are still there: lifetimes are renewed, and what Redis has forgotten is written again.
-- KEYS: connection:{user}, presence:{user}. ARGV: Presence JSON, connection TTL s, presence TTL s, then device, ConnectionRegistry JSON, ...
-- A field that names another connection is left alone: that one is newer.
for i = 4, #ARGV, 2 do
  redis.call('HSETNX', KEYS[1], ARGV[i], ARGV[i + 1])
end
redis.call('EXPIRE', KEYS[1], ARGV[2])
redis.call('SET', KEYS[2], ARGV[1], 'EX', ARGV[3])
return 1
