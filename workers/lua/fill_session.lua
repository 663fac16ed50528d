-- Fill a cache entry that is still claimed by the caller. KEYS: session. ARGV: claim, value, its life in seconds.
if redis.call('GET', KEYS[1]) == ARGV[1] then
  redis.call('SET', KEYS[1], ARGV[2], 'EX', ARGV[3])
end
