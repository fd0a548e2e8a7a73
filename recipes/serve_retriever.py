"""Serve a retriever over HTTP: one index for all processes of a run, and for several runs.

    python recipes/serve_retriever.py --corpus passages.jsonl
    python recipes/serve_retriever.py --corpus passages.jsonl --save_index wiki-bm25     # index once ...
    python recipes/serve_retriever.py --index wiki-bm25 --host 0.0.0.0 --port 8000       # ... start at once
    python recipes/serve_retriever.py --retriever_backend lucene --index wikipedia-kilt-doc
    python recipes/serve_retriever.py --corpus demo                                      # the demo's encyclopedia

Train with it: `accelerate launch recipes/train.py --retriever_url http://localhost:8000 ...`. The server supports the
interfaces of Search-R1 and SkyRL (`POST /retrieve`) and of FlashRAG and ReCall (`POST /search`, `POST /batch_search`);
`GET /health` answers 200 when the index is loaded. Requires `pip install "tspo-trl[server]"`.
"""

from tspo_trl.commands.errors import run_command
from tspo_trl.commands.serve import main

if __name__ == "__main__":
    run_command(main)
