-- Append undelivered message ids to inboxes. KEYS: inboxes. ARGV: lifetime in seconds, most ids kept, then for each key: number of ids, the ids.
local at = 3
for k = 1, #KEYS do
  local n = tonumber(ARGV[at])
  for first = at + 1, at + n, 1000 do -- Lua puts no more than 8000 values on its stack
    redis.call('RPUSH', KEYS[k], unpack(ARGV, first, math.min(first + 999, at + n)))
  end
  redis.call('LTRIM', KEYS[k], -tonumber(ARGV[2]), -1)
  redis.call('EXPIRE', KEYS[k], ARGV[1])
  at = at + n + 1
end
return #KEYS
