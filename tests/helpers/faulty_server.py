"""A retrieval server that fails on demand: `POST /mode` with "ok" or one of the modes below."""

import argparse
import asyncio

import uvicorn
from fastapi import Request, Response
from fastapi.responses import JSONResponse

from tspo_trl import BM25Retriever, load_corpus
from tspo_trl.retrieval.server import create_app


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    retriever = BM25Retriever(load_corpus(arguments.corpus))
    app = create_app(lambda: retriever)
    state = {"mode": "ok", "left": -1, "requests": 0}

    @app.post("/mode")
    async def set_mode(request: Request):
        """Set the mode, and the number of requests for which it is used (-1: no limit)."""
        state.update(await request.json())
        return {"requests": state["requests"]}

    @app.middleware("http")
    async def misbehave(request: Request, call_next):
        if request.url.path != "/retrieve":
            return await call_next(request)
        state["requests"] += 1
        mode = state["mode"] if state["left"] else "ok"
        state["left"] -= state["left"] > 0
        if mode == "slow":
            await asyncio.sleep(3600)
        if mode == "drip":  # one byte at a time, so that no single read times out
            return Dripping()
        if mode == "500":
            return Response("Internal Server Error", 500)
        if mode == "429":
            return Response("later", 429, headers={"retry-after": "1"})
        if mode == "403":
            return Response("no key", 403)
        if mode.startswith("charset "):
            return Response("no such page", 404, headers={"content-type": f"text/plain; charset={mode.split()[1]}"})
        if mode == "not zipped":
            return Response("{}", 200, headers={"content-encoding": "gzip"})
        if mode == "huge score":
            queries = len((await request.json())["queries"])
            item = '[{"document": {"text": "x"}, "score": 1' + "0" * 400 + "}]"
            return Response('{"result": [' + ", ".join([item] * queries) + "]}", 200)
        if mode == "garbage":
            return Response("<html>oops", 200)
        if mode == "not utf-8":
            return Response(b'{"result": "\xff"}', 200)
        if mode == "another object":
            return Response('{"results": []}', 200)
        if mode == "too few":
            return Response('{"result": []}', 200)
        if mode == "not passages":
            queries = len((await request.json())["queries"])
            return Response(
                '{"result": [' + ", ".join(['[{"document": {"id": "1"}, "score": 1}]'] * queries) + "]}", 200
            )
        if mode == "odd passage":  # one malformed passage for queries with the word "odd"
            queries = (await request.json())["queries"]
            odd = [{"document": {"id": "1", "text": None}, "score": 1}]
            fine = [{"document": {"id": "1", "text": query}, "score": None} for query in queries]
            return JSONResponse({"result": [odd if "odd" in q else [p] for q, p in zip(queries, fine, strict=True)]})
        if mode in ("422 odd", "500 odd", "garbage odd", "drop odd"):  # trouble with queries with the word "odd"
            queries = (await request.json())["queries"]
            if mode == "drop odd":
                return JSONResponse(
                    {"result": [[{"id": "1", "text": query}] for query in queries if "odd" not in query]}
                )
            if any("odd" in query for query in queries):
                return Response("an odd query", 200 if mode == "garbage odd" else int(mode.split()[0]))
        if mode == "redirect":
            return Response("", 307, headers={"location": "/login?from=retrieve"})
        if mode == "cut":
            return Response('{"result": [[', 200, headers={"content-length": "1000"})
        return await call_next(request)

    uvicorn.run(app, port=arguments.port, log_level="critical")


class Dripping(Response):
    async def __call__(self, scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while True:
            await send({"type": "http.response.body", "body": b" ", "more_body": True})
            await asyncio.sleep(0.05)


if __name__ == "__main__":
    main()
