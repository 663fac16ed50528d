-- Give up shard leases that are still this worker's. KEYS: leases. ARGV: worker id.
for k = 1, #KEYS do
  if redis.call('GET', KEYS[k]) == ARGV[1] then
    redis.call('DEL', KEYS[k])
  end
end
return #KEYS
