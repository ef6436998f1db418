#!/usr/bin/env bash
# Sets everything up on a fresh machine, then pretrains a small GPT on real text with 2 processes, without a
# GPU and without downloading data: the text is this Python's own standard library. Run again, it resumes.
#
#   bash launch/quickstart.sh [--fresh] [--steps N] [--folder DIR] [--no-install]
#
#   --fresh        forget the earlier run and start over
#   --steps N      optimizer steps (default 240)
#   --folder DIR   where corpus, checkpoints and report go (default runs/quickstart)
#   --no-install   use the current Python environment as it is
# PYTHON=python3.12 bash launch/quickstart.sh   chooses the interpreter of a new environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

steps=240 folder=runs/quickstart fresh=0 install=1
while [ $# -gt 0 ]; do
  case "$1" in
    --fresh) fresh=1 ;;
    --steps) steps=${2:?--steps needs a number}; shift ;;
    --folder) folder=${2:?--folder needs a name}; shift ;;
    --no-install) install=0 ;;
    -h | --help) sed -n '2,12p' "${BASH_SOURCE[0]}" | sed 's/^# \{0,1\}//'; exit 0 ;;
    *) echo "quickstart.sh: unknown argument $1; see --help" >&2; exit 2 ;;
  esac
  shift
done
case "$steps" in '' | *[!0-9]* | 0) echo "quickstart.sh: --steps $steps: must be a whole number above 0" >&2; exit 2 ;; esac

begin=$SECONDS
say() { printf '\n== %s (%ss)\n' "$*" "$((SECONDS - begin))"; }

if [ "$install" = 1 ]; then
  say "1/5 environment"
  source launch/environment.sh '.[megatron,data,report]'
else
  say "1/5 environment: as it is"
  export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
fi
python=$(command -v python || command -v python3)
read -r accelerator processes < <("$python" -c 'import torch
gpus = torch.cuda.device_count()
print("cuda" if gpus else "cpu", min(2, gpus) or 2)' 2>/dev/null) || {
  echo "quickstart.sh: torch cannot be imported by $python; leave --no-install out" >&2
  exit 2
}
export DS_ACCELERATOR=${DS_ACCELERATOR:-$accelerator}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-true}

# torch's own note to itself; a newer name of a collective that DeepSpeed calls.
export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore::FutureWarning:torch.distributed.c10d_logger}

if [ "$fresh" = 1 ]; then
  rm -rf "$folder/corpus" "$folder/checkpoints" "$folder/run" "$folder/report"
fi

say "2/5 corpus and tokenizer from the standard library"
"$python" launch/build_corpus.py --output-dir "$folder/corpus" --max-megabytes 12 --vocab-size 4096 || {
  status=$?
  [ "$status" != 2 ] || echo "quickstart.sh: --fresh starts over, --folder takes another place" >&2
  exit "$status"
}

say "3/5 indexed datasets"
for split in train valid; do
  if [ -f "$folder/corpus/${split}_text_document.json" ]; then # written last
    echo "$folder/corpus/${split}_text_document: complete already; kept"
  else
    "$python" launch/prepare_data.py --input "$folder/corpus/$split.jsonl" --output-prefix "$folder/corpus/$split" \
      --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$folder/corpus/tokenizer.json" --workers 2
  fi
done

say "4/5 training with $processes processes: $steps steps; the first one comes after about 20 s"
if [ -f "$folder/checkpoints/latest" ]; then
  echo "resuming from $folder/checkpoints/$(cat "$folder/checkpoints/latest"); --fresh starts over"
fi
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
# The same as the command `deepspeed`, which --no-install need not have on its path.
"$python" -m deepspeed.launcher.runner --num_gpus "$processes" --master_port "$port" --log_level error \
  launch/pretrain_gpt.py \
  --deepspeed_config ds_configs/cpu_quickstart.json \
  --num-layers 4 --hidden-size 192 --num-attention-heads 6 --seq-length 128 --position-embedding-type rope \
  --attention-dropout 0 --hidden-dropout 0 \
  --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$folder/corpus/tokenizer.json" \
  --train-data-path "$folder/corpus/train_text_document" --valid-data-path "$folder/corpus/valid_text_document" \
  --micro-batch-size 8 --global-batch-size 16 --train-iters "$steps" --num-workers 0 \
  --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-warmup-fraction 0.05 --weight-decay 0.1 --adam-beta2 0.95 \
  --log-interval 10 --eval-interval 60 --eval-iters 8 --save-interval 60 \
  --save "$folder/checkpoints" --load "$folder/checkpoints" --run-dir "$folder/run"

say "5/5 report"
"$python" -m ds_efficient report "$folder/run" --output "$folder/report"
say "done: open $folder/report/report.md"
