#!/usr/bin/env bash
# Run here before a call: the copy on the GPU machine has no .git, so records there learn the commit from the carried file .peers/COMMIT.
cd "$(dirname "$0")/../.." && mkdir -p .peers && { git rev-parse HEAD; git status --porcelain --untracked-files=no | grep -q . && echo dirty; } >.peers/COMMIT
cat .peers/COMMIT
