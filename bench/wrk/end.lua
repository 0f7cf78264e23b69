-- Ends every run of wrk with one line for bench/wrk.py: what was answered, and how long it took.

function done(summary, latency, requests)
   local errors = summary.errors
   io.write(string.format(
      'skipbus {"requests":%d,"duration_us":%d,"refused":%d,"broken":%d,"median_us":%d,"p99_us":%d}\n',
      summary.requests, summary.duration, errors.status,
      errors.connect + errors.read + errors.write + errors.timeout,
      latency:percentile(50), latency:percentile(99)))
end
