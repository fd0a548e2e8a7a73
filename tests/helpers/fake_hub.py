"""A small local Hugging Face Hub: the part of its API that the client uses to create, fill, list and read models.

Repositories are kept in memory. Writing needs the token `hf_test`. `POST /fake/fail [{"path": …, "status": …}]` makes requests
whose path contains the given text fail with the given status. `GET /fake/commits/<user>/<name>` lists the commits.
"""

import argparse
import base64
import hashlib
import json
import re

import pathspec
import uvicorn
import yaml
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse

TOKEN = "hf_test"
LFS = (".safetensors", ".bin", ".pt", ".pth")
REPO_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")


class Repository:
    def __init__(self, repo_id):
        self.id = repo_id
        self.commits = []  # of (sha, message, {path: bytes or LFS oid})
        self.commit("initial commit", {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})

    def commit(self, message, files):
        sha = hashlib.sha1(f"{self.id} {len(self.commits)} {message}".encode()).hexdigest()
        self.commits.append((sha, message, files))
        return sha

    def at(self, revision):
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


def error(status, code, message):
    return JSONResponse({"error": message}, status, headers={"X-Error-Code": code, "X-Error-Message": message})


def metadata_errors(content):
    """The errors that the Hub reports: metadata must be YAML, and models and data sets must be ids."""
    match = re.match(r"---\n(.*?)\n---", content, re.DOTALL)
    try:
        data = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError as failure:
        return [str(failure)]
    errors = []
    for key in ("base_model", "datasets"):
        values = data.get(key) or []
        for value in [values] if isinstance(values, str) else values:
            if not REPO_ID.fullmatch(value):
                errors.append(f'"{key}" with value "{value}" is not valid. Use an id from https://hf.co.')
    for model in data.get("model-index", []):
        if not isinstance(model.get("name"), str) or not all(
            {"task", "dataset", "metrics"} <= set(result) and {"type", "name"} <= set(result["dataset"])
            for result in model["results"]
        ):
            errors.append('"model-index" is not valid.')
    return errors


def create_hub(url, storage):
    """The Hub at `url`. Like the real one, it serves large files from another address, `storage`."""
    app = FastAPI()
    repositories, objects, failures = {}, {}, []

    @app.middleware("http")
    async def watch(request: Request, call_next):
        path = request.url.path
        if not path.startswith(("/fake", "/health")):
            for failure in failures:
                if failure["path"] in path:
                    return error(failure["status"], "", "requested failure")
            writes = request.method not in ("GET", "HEAD") and not path.startswith("/lfs/")
            if writes and request.headers.get("authorization") != f"Bearer {TOKEN}":
                return error(401, "", "Invalid credentials in Authorization header")
        return await call_next(request)

    @app.get("/health")
    def health():
        return {}

    @app.post("/fake/fail")
    async def fail(request: Request):
        failures.clear()
        failures.extend(await request.json())
        return {}

    @app.get("/fake/commits/{user}/{name}")
    def commits(user: str, name: str):
        repository = repositories.get(f"{user}/{name}")
        return [
            {"message": m, "files": sorted(files)}
            for _, m, files in (repository.commits if repository is not None else [])
        ]

    @app.post("/api/repos/create")
    async def create(request: Request):
        body = await request.json()
        repo_id = f"{body.get('organization') or 'user'}/{body['name']}"
        answer = {"url": f"{url}/{repo_id}", "id": repo_id, "name": repo_id}
        if repo_id in repositories:
            return JSONResponse({**answer, "error": "You already created this model repo"}, 409)
        repositories[repo_id] = Repository(repo_id)
        return answer

    @app.post("/api/validate-yaml")
    async def validate(request: Request):
        errors = metadata_errors((await request.json())["content"])
        return JSONResponse({"errors": [{"message": e} for e in errors], "warnings": []}, 400 if errors else 200)

    @app.post("/api/models/{user}/{name}/preupload/{revision}")
    async def preupload(user: str, name: str, revision: str, request: Request):
        if (repository := repositories.get(f"{user}/{name}")) is None:
            return error(404, "RepoNotFound", "Repository not found")
        body = await request.json()
        ignore = body.get("gitIgnore") or repository.at("main")[2].get(".gitignore", b"").decode()
        ignored = pathspec.GitIgnoreSpec.from_lines(ignore.splitlines())
        return {
            "files": [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LFS) or file["size"] > 10_000_000 else "regular",
                    "shouldIgnore": ignored.match_file(file["path"]),
                    "oid": None,
                }
                for file in body["files"]
            ]
        }

    @app.post("/{user}/{name}.git/info/lfs/objects/batch")
    async def batch(user: str, name: str, request: Request):
        answers = []
        for item in (await request.json())["objects"]:
            answer = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in objects:
                answer["actions"] = {
                    "upload": {"href": f"{storage}/lfs/{item['oid']}"},
                    "verify": {"href": f"{url}/api/lfs/verify"},
                }
            answers.append(answer)
        return JSONResponse({"transfer": "basic", "objects": answers}, media_type="application/vnd.git-lfs+json")

    @app.put("/lfs/{oid}")
    async def upload(oid: str, request: Request):
        content = await request.body()
        if hashlib.sha256(content).hexdigest() != oid:
            return error(400, "", "Content does not match its oid")
        objects[oid] = content
        return {}

    @app.post("/api/lfs/verify")
    async def verify(request: Request):
        body = await request.json()
        return Response(status_code=200 if len(objects.get(body["oid"], b"")) == body["size"] else 404)

    @app.post("/api/models/{user}/{name}/commit/{revision}")
    async def commit(user: str, name: str, revision: str, request: Request):
        if (repository := repositories.get(f"{user}/{name}")) is None:
            return error(404, "RepoNotFound", "Repository not found")
        header, files = {}, dict(repository.at("main")[2])
        for line in (await request.body()).decode().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                header = value
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in objects:
                    return error(400, "", f"LFS object of {value['path']} was not uploaded")
                files[value["path"]] = value["oid"]
            elif item["key"] == "deletedFile":
                files.pop(value["path"], None)
        if errors := metadata_errors(files.get("README.md", b"").decode()):
            return error(400, "", f"Invalid metadata in README.md. {errors}")
        sha = repository.commit(header["summary"], files)
        return {"success": True, "commitOid": sha, "commitUrl": f"{url}/{repository.id}/commit/{sha}"}

    @app.get("/api/models/{user}/{name}")
    @app.get("/api/models/{user}/{name}/revision/{revision}")
    def info(user: str, name: str, revision: str = "main"):
        if (repository := repositories.get(f"{user}/{name}")) is None:
            return error(404, "RepoNotFound", "Repository not found")
        if (found := repository.at(revision)) is None:
            return error(404, "RevisionNotFound", "Invalid rev id")
        siblings = [{"rfilename": path} for path in sorted(found[2])]
        return {"id": repository.id, "modelId": repository.id, "sha": found[0], "private": False, "siblings": siblings}

    @app.get("/api/models/{user}/{name}/tree/{revision}")
    @app.get("/api/models/{user}/{name}/tree/{revision}/{folder:path}")
    def tree(user: str, name: str, revision: str, folder: str = ""):
        if (repository := repositories.get(f"{user}/{name}")) is None:
            return error(404, "RepoNotFound", "Repository not found")
        if (found := repository.at(revision)) is None:
            return error(404, "RevisionNotFound", "Invalid rev id")
        listed = [
            {
                "type": "file",
                "path": path,
                "size": len(content if isinstance(content, bytes) else objects[content]),
                "oid": "0",
            }
            for path, content in sorted(found[2].items())
            if path.startswith(f"{folder}/" if folder else "")
        ]
        return listed or error(404, "EntryNotFound", f"{folder} does not exist")

    @app.api_route("/{user}/{name}/resolve/{revision}/{path:path}", methods=["GET", "HEAD"])
    def resolve(user: str, name: str, revision: str, path: str):
        if (repository := repositories.get(f"{user}/{name}")) is None:
            return error(404, "RepoNotFound", "Repository not found")
        if (found := repository.at(revision)) is None:
            return error(404, "RevisionNotFound", "Invalid rev id")
        sha, _, files = found
        if path not in files:
            answer = error(404, "EntryNotFound", "Entry not found")
            answer.headers["X-Repo-Commit"] = sha
            return answer
        content = files[path]
        if isinstance(content, bytes):
            headers = {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
            return Response(content, headers=headers, media_type="application/octet-stream")
        headers = {"X-Repo-Commit": sha, "X-Linked-Size": str(len(objects[content])), "X-Linked-ETag": f'"{content}"'}
        return RedirectResponse(f"{storage}/lfs/{content}", 302, headers=headers)

    @app.api_route("/lfs/{oid}", methods=["GET", "HEAD"])
    def download(oid: str):
        return Response(objects[oid], headers={"ETag": f'"{oid}"'}, media_type="application/octet-stream")

    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    port = parser.parse_args().port
    app = create_hub(f"http://127.0.0.1:{port}", storage=f"http://localhost:{port}")
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")
