#!/usr/bin/env bash
# All that a GPU is needed for, in ten minutes on a bare machine that has one.
#
#   benchmarks/gpu.sh                    tests, peers, engine, kernels; logs in gpu-output/
#   benchmarks/gpu.sh peers kernels      some of these
#   benchmarks/gpu.sh --dry-run          print the commands and run none
#   benchmarks/gpu.sh --device cpu       the same on small things, to test the script itself
#
#   tests    pytest -m gpu
#   peers    SmolLM2-135M and a Llama of 1 B random weights, ours beside llm-compressor in one run
#   engine   artifacts of 3 and 8 bits and with layers left dense, loaded in vLLM, logits compared
#   kernels  where the time of GPTQ's sweep and of ecsq goes, by the profiler of torch
#
# Environment, each with its default: PYTHON (python; has optimum-order[dev]), PEERS_PYTHON (.venv-peers/bin/python; has
# llm-compressor), VLLM_PYTHON (.venv-vllm/bin/python; has vllm), SMOLLM2 (HuggingFaceTB/SmolLM2-135M, or a folder),
# OUTPUT (gpu-output), MINUTES (10). A part whose environment is missing is reported and fails; the others run.
#
# On an H200 (torch 2.11, transformers 5.17, llm-compressor 0.14.0.1) all 76 tests of the kernel and 35 of the 36 of
# tests/test_gpu.py passed; `kernels` and most of `peers` ran, see docs/results.md. `engine` has not run on a GPU. Ten
# minutes are not much: of each process 15 seconds go by in its imports there, and peers.py starts two for each figure.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

PYTHON=${PYTHON:-python}
PEERS_PYTHON=${PEERS_PYTHON:-.venv-peers/bin/python}
VLLM_PYTHON=${VLLM_PYTHON:-.venv-vllm/bin/python}
SMOLLM2=${SMOLLM2:-HuggingFaceTB/SmolLM2-135M}
OUTPUT=${OUTPUT:-gpu-output}
MINUTES=${MINUTES:-10}
device=cuda
dry=
parts=()
while (($#)); do
  case $1 in
    --dry-run) dry=1 ;;
    --device) device=${2:?--device needs cuda or cpu}; shift ;;
    tests | peers | engine | kernels) parts+=("$1") ;;
    *) echo "gpu.sh: '$1' is no part: tests, peers, engine, kernels; or --dry-run, --device cpu" >&2; exit 2 ;;
  esac
  shift
done
((${#parts[@]})) || parts=(tests peers engine kernels)
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
end=$((SECONDS + 60 * MINUTES))
failed=()

# run NAME COMMAND...: in the time that is left, with a log
run() {
  local name=$1 begin=$SECONDS
  shift
  echo "== $name: $*"
  if [[ $dry ]]; then return; fi
  if ((end - SECONDS < 5)); then
    echo "-- $name: not run, the $MINUTES minutes are over"
    failed+=("$name")
    return
  fi
  if timeout $((end - SECONDS)) "$@" >"$OUTPUT/$name.log" 2>&1; then
    echo "-- $name: done in $((SECONDS - begin)) s"
  else
    echo "-- $name: failed with exit code $? after $((SECONDS - begin)) s"
    failed+=("$name")
  fi
  tail -n 25 "$OUTPUT/$name.log"
}

[[ $dry ]] || mkdir -p "$OUTPUT"
if [[ $device == cuda && ! $dry ]]; then
  nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader | tee "$OUTPUT/gpu.txt" || exit 2
fi
for part in "${parts[@]}"; do
  case $part in
    tests) run tests "$PYTHON" -m pytest -n 8 --dist load -q -p no:cacheprovider -m gpu tests/test_gpu.py tests/backends/kernels ;;
    kernels)
      sizes=(--outputs 4096 --inputs 4096)
      [[ $device == cpu ]] && sizes=(--outputs 256 --inputs 256 --tokens 512)
      run kernels "$PYTHON" benchmarks/hot_spots.py --device "$device" "${sizes[@]}"
      ;;
    peers)
      common=(benchmarks/peers.py --parts speed --rounds 1 --device "$device" --theirs "$PEERS_PYTHON")
      if [[ $device == cuda ]]; then
        run models "$PYTHON" benchmarks/gpu_models.py "$OUTPUT" --smollm2 "$SMOLLM2"
        run peers-smollm2 "$PYTHON" "${common[@]}" --model "$OUTPUT/smollm2" --recipes wanda gptq block --samples 128
        run peers-1b "$PYTHON" "${common[@]}" --model "$OUTPUT/llama-1b" --recipes gptq block --samples 32
      else
        run models "$PYTHON" benchmarks/gpu_models.py "$OUTPUT" --smollm2 tiny-llama --tiny
        run peers-smollm2 "$PYTHON" "${common[@]}" --model "$OUTPUT/smollm2" --recipes gptq --samples 4
        run peers-1b "$PYTHON" "${common[@]}" --model "$OUTPUT/llama-1b" --recipes gptq --samples 4
      fi
      ;;
    engine)
      run engine "$PYTHON" benchmarks/engines.py "$OUTPUT/engines.json" --only vllm --vllm "$VLLM_PYTHON" \
        --match "compressed-tensors.*(bits=[38], group_size=(-1|32|128)|several)"
      ;;
  esac
done
if ((${#failed[@]})); then
  echo "gpu.sh: failed: ${failed[*]}; logs in $OUTPUT" >&2
  exit 1
fi
