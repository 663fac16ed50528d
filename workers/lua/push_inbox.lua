-- Append undelivered message ids to inboxes. KEYS: inboxes. ARGV: lifetime in seconds, most ids kept, then for each key: number of ids, the ids.
local at = 3
for k = 1, #KEYS do
  local n = tonumber(ARGV[at])
  redis.call('RPUSH', KEYS[k], unpack(ARGV, at + 1, at + n))
  redis.call('LTRIM', KEYS[k], -tonumber(ARGV[2]), -1)
  redis.call('EXPIRE', KEYS[k], ARGV[1])
  at = at + n + 1
end
return #KEYS
