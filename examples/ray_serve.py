"""shoal's server on a Ray cluster: ``serve run examples.ray_serve:app`` (or ``serve deploy``, with the options in the file).

Then http://localhost:8000/v1 is OpenAI's API, of as many replicas as are needed. See docs/server.md, "Behind Ray Serve".
"""

from __future__ import annotations

from shoal.ray import serve_app

app = serve_app(
    "smollm2:135m",
    threads=2,  # of each replica, which also reserves as many CPUs
    max_num_seqs=32,
    max_model_len=2048,
    request_timeout=120,
    autoscaling_config={"min_replicas": 1, "max_replicas": 4},  # one replica for every 32 requests under way
)
