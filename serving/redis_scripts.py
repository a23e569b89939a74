"""What the Redis store writes, as scripts that Redis runs whole or not at all, and the records they read by position.

Ids are 64-bit and Lua's numbers are doubles: ids travel packed or as text and are only ever compared as text.
Keys (after the prefix): e:REQUEST slot -> record; log the requests by first event; u:USER and t:USER the recent records
and their times; s:USER and f:USER packed ids of videos seen and authors followed; v:REQUEST slot -> served row, and
`from` -> the shortlist; order, state, video the changes of the catalogue.
"""

from __future__ import annotations

from features.schema import SIGNALS
from serving.redis_records import RECORD, TRUE

_AT = {name: field[1] + 1 for name, field in RECORD.fields.items()} if RECORD.fields else {}
"""First byte of each field, counted from 1 as Lua does."""

LOG = f"""
local prefix, recent = ARGV[1], tonumber(ARGV[2])
local stored, merged, conflicting = 0, 0, 0
local follow = {_AT["signals"] + SIGNALS.index("follow")}
for i = 3, #ARGV, 4 do
  local request, slot, user, record = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]
  local key, member = prefix .. 'e:' .. request, ARGV[i] .. '\\0' .. ARGV[i + 1]
  local old = redis.call('HGET', key, slot)
  local same = old and string.sub(old, 1, {_AT["author_id"] - 1}) == string.sub(record, 1, {_AT["author_id"] - 1})
  if old and not same then
    conflicting = conflicting + 1
  else
    local followed, kept = old and string.byte(old, follow) == {TRUE}, true
    if old then
      merged = merged + 1
      kept = redis.call('HEXISTS', prefix .. 'u:' .. user, member) == 1
      local watch = struct.unpack('<d', old, {_AT["watch_ms"]})
      watch = math.max(watch, (struct.unpack('<d', record, {_AT["watch_ms"]})))
      local signals = {{}}
      for s = {_AT["signals"]}, {RECORD.itemsize} do
        signals[#signals + 1] = string.char(math.max(string.byte(old, s), string.byte(record, s)))
      end
      record = string.sub(old, 1, {_AT["watch_ms"] - 1}) .. struct.pack('<d', watch)
        .. string.sub(old, {_AT["duration_ms"]}, {_AT["signals"] - 1}) .. table.concat(signals)
    else
      stored = stored + 1
      local number = redis.call('INCR', prefix .. 'number')
      record = string.sub(record, 1, {_AT["number"] - 1}) .. struct.pack('<d', number)
        .. string.sub(record, {_AT["signals"]})
      redis.call('ZADD', prefix .. 'log', 'NX', number, request)
      redis.call('PERSIST', prefix .. 'v:' .. request)
      redis.call('APPEND', prefix .. 's:' .. user, string.sub(record, {_AT["video_id"]}, {_AT["author_id"] - 1}))
    end
    redis.call('HSET', key, slot, record)
    local author = string.sub(record, {_AT["author_id"]}, {_AT["ts_ms"] - 1})
    if string.byte(record, follow) == {TRUE} and not followed and author ~= string.rep('\\0', 8) then
      redis.call('APPEND', prefix .. 'f:' .. user, author)
    end
    if kept then
      redis.call('HSET', prefix .. 'u:' .. user, member, record)
      redis.call('ZADD', prefix .. 't:' .. user, struct.unpack('<d', record, {_AT["ts_ms"]}), member)
      if redis.call('HLEN', prefix .. 'u:' .. user) > recent then
        local oldest = redis.call('ZPOPMIN', prefix .. 't:' .. user)
        redis.call('HDEL', prefix .. 'u:' .. user, oldest[1])
      end
    end
  end
end
return {{stored, merged, conflicting}}
"""
"""ARGV: prefix, records kept a user, then request, slot, user and record of each event."""

SERVED = """
local prefix, request, user, expire_s = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local key = prefix .. 'v:' .. request
local known = redis.call('HGETALL', key)
for i = 1, #known, 2 do
  if string.sub(known[i + 1], 1, #user + 1) == user .. ' ' then redis.call('HDEL', key, known[i]) end
end
for i = 5, #ARGV, 2 do redis.call('HSETNX', key, ARGV[i], user .. ' ' .. ARGV[i + 1]) end
if redis.call('EXISTS', prefix .. 'e:' .. request) == 0 then redis.call('EXPIRE', key, expire_s) end
"""
"""ARGV: prefix, request, user, seconds that an unanswered slate is kept, then slot (or `from`) and JSON of each row."""

KEEP = """
local prefix, acknowledged_ms, number = ARGV[1], ARGV[2], 0
for i = 3, #ARGV, 2 do
  local video, described = ARGV[i], ARGV[i + 1]
  number = redis.call('INCR', prefix .. 'changes')
  redis.call('ZADD', prefix .. 'order', number, video)
  redis.call('HSET', prefix .. 'state', video, acknowledged_ms .. (described == '' and ' removed' or ' shown'))
  if described ~= '' then redis.call('HSET', prefix .. 'video', video, described) end
end
return number
"""
"""ARGV: prefix, clock, then id and JSON of each video; an empty text removes it, and keeps what was known of it."""

FORGET = """
local prefix = ARGV[1]
for i = 2, #ARGV do
  for _, video in ipairs(redis.call('ZRANGEBYSCORE', prefix .. 'order', ARGV[i], ARGV[i])) do
    redis.call('ZREM', prefix .. 'order', video)
    redis.call('HDEL', prefix .. 'state', video)
    redis.call('HDEL', prefix .. 'video', video)
  end
end
"""
"""ARGV: prefix, then numbers of changes."""
