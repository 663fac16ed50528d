-- Take what is due, for as long as a lease; what others took and did not finish within theirs is due again.
-- KEYS: due, claimed. ARGV: now in epoch ms, end of the lease in epoch ms, most entries.
for _, entry in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', ARGV[1], 'LIMIT', 0, ARGV[3])) do
  redis.call('ZREM', KEYS[2], entry)
  redis.call('ZADD', KEYS[1], 'NX', ARGV[1], entry)
end
local taken = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', ARGV[1], 'LIMIT', 0, ARGV[3])
for _, entry in ipairs(taken) do
  redis.call('ZREM', KEYS[1], entry)
  redis.call('ZADD', KEYS[2], ARGV[2], entry)
end
return taken
