-- Entries are done with: those that are still held by this lease are let go, and some are due again later.
-- KEYS: due, claimed. ARGV: end of the lease in epoch ms, number of entries, the entries, then epoch ms and entry of each that is due.
local count = tonumber(ARGV[2])
for at = 3, 2 + count do
  local held = redis.call('ZSCORE', KEYS[2], ARGV[at])
  if held and tonumber(held) == tonumber(ARGV[1]) then
    redis.call('ZREM', KEYS[2], ARGV[at])
  end
end
for at = 3 + count, #ARGV, 2 do
  redis.call('ZADD', KEYS[1], 'NX', ARGV[at], ARGV[at + 1])
end
return 1
