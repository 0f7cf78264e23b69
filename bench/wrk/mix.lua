-- What an api process meets in its life, in rounds of eight requests: two GET /capabilities, three GET /key, two
-- GET /key/{keyId} from a file of keyIds, and one that must be refused. Arguments are the file, the query
-- and the number of the first bad request.

dofile(debug.getinfo(1, "S").source:match("^@(.*/)") .. "end.lua")

local requests, position = {}, 0

-- Each bad request is another one, so that whatever remembers requests has something to remember.
local function bad(n)
   local kinds = {
      "/key?remoteSystemID=nobody-" .. n,
      "/key?size=" .. n .. "x",
      "/key/" .. n,
      "/no/such/path/" .. n,
      "/entropy?minentropy=-" .. n,
      string.format("/key/%032x?remoteSystemID=%%00%%3Cscript%%3E%d", n, n),
   }
   return wrk.format("GET", kinds[n % #kinds + 1])
end

function init(args)
   local capabilities = wrk.format("GET", "/capabilities")
   local key = wrk.format("GET", "/key?" .. args[2])
   local next_id = io.lines(args[1])
   local first = tonumber(args[3])
   local round = 0
   while true do
      local one = next_id()
      local other = one and next_id()
      if not other then
         return
      end
      round = round + 1
      local by_id = function(id) return wrk.format("GET", "/key/" .. id .. "?" .. args[2]) end
      for _, each in ipairs({capabilities, key, by_id(one), key, capabilities, by_id(other), key, bad(first + round)}) do
         requests[#requests + 1] = each
      end
   end
end

function request()
   if position < #requests then
      position = position + 1
   end
   return requests[position]
end
