-- Acknowledge and trim what a lane has finished, one call for all its shards.
-- KEYS: ingest streams. ARGV: group, then for each key: number of ids, the ids, and the lowest id that must stay ("" trims nothing).
-- XTRIM is approximate: whole nodes only, so it costs next to nothing.
local at = 2
for k = 1, #KEYS do
  local n = tonumber(ARGV[at])
  if n > 0 then
    redis.call('XACK', KEYS[k], ARGV[1], unpack(ARGV, at + 1, at + n))
  end
  local floor = ARGV[at + n + 1]
  if floor ~= '' then
    redis.call('XTRIM', KEYS[k], 'MINID', '~', floor)
  end
  at = at + n + 2
end
return #KEYS
