-- Acknowledge and trim what a lane has finished, one call for all its shards.
-- KEYS: ingest streams. ARGV: group, then for each key: number of ids, the ids, and the lowest id that must stay ("" trims nothing).
-- What is still pending stays too: the caller may know nothing of it, when a read's reply was lost or came to another.
-- XTRIM is approximate: whole nodes only, so it costs next to nothing.
local at = 2
for k = 1, #KEYS do
  local n = tonumber(ARGV[at])
  if n > 0 then
    redis.call('XACK', KEYS[k], ARGV[1], unpack(ARGV, at + 1, at + n))
  end
  local floor = ARGV[at + n + 1]
  if floor ~= '' then
    -- Everything below the oldest that is pending was acknowledged. An error: the group is gone, and nobody reads in it.
    local pending = redis.pcall('XPENDING', KEYS[k], ARGV[1])
    if pending[1] and pending[1] > 0 then
      floor = pending[2]
    end
    redis.call('XTRIM', KEYS[k], 'MINID', '~', floor)
  end
  at = at + n + 2
end
return #KEYS
