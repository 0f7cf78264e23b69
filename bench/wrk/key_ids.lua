-- GET /key/{keyId} for every keyId of a file, each once: arguments are the file and the query.
-- When the file is at its end its last keyId is asked for again, which is refused, so that the run does not count.

dofile(debug.getinfo(1, "S").source:match("^@(.*/)") .. "end.lua")

local requests, position = {}, 0

function init(args)
   for key_id in io.lines(args[1]) do
      requests[#requests + 1] = wrk.format("GET", "/key/" .. key_id .. "?" .. args[2])
   end
end

function request()
   if position < #requests then
      position = position + 1
   end
   return requests[position]
end
