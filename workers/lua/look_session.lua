-- Read a cache entry; where there is none, claim it. KEYS: session. ARGV: claim, its life in seconds.
local value = redis.call('GET', KEYS[1])
if not value then
  redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
end
return value
