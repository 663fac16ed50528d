-- Take one of a limited number per window. KEYS: allowance. ARGV: limit, window in seconds.
-- Returns 0, or the milliseconds until the window ends when all are taken.
local taken = tonumber(redis.call('GET', KEYS[1]) or '0')
if taken >= tonumber(ARGV[1]) then
  local left = redis.call('PTTL', KEYS[1])
  return left > 0 and left or 1
end
if redis.call('INCR', KEYS[1]) == 1 then
  redis.call('EXPIRE', KEYS[1], ARGV[2])
end
return 0
