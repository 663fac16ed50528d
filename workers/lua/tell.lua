-- Append to instances' streams what only the owner of these shards may say; nothing once somebody else holds one of them.
-- A request that waited in a broken line comes after what the next owner has told.
-- KEYS: leases, then down streams. ARGV: worker id, number of leases, most entries, field, then a record for each stream.
local leases = tonumber(ARGV[2])
for k = 1, leases do
  local owner = redis.call('GET', KEYS[k])
  if owner and owner ~= ARGV[1] then
    return 0
  end
end
for k = leases + 1, #KEYS do
  redis.call('XADD', KEYS[k], 'NOMKSTREAM', 'MAXLEN', '~', ARGV[3], '*', ARGV[4], ARGV[4 + k - leases])
end
return 1
