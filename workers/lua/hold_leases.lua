-- Take or renew shard leases. KEYS: leases. ARGV: worker id, lifetime in ms.
-- Returns for each key 1 where the worker holds it now, else 0.
local held = {}
for k = 1, #KEYS do
  local owner = redis.call('GET', KEYS[k])
  if not owner or owner == ARGV[1] then
    redis.call('SET', KEYS[k], ARGV[1], 'PX', ARGV[2])
    held[k] = 1
  else
    held[k] = 0
  end
end
return held
