#!/usr/bin/env bash
# What pretraining is worth: atto by FCMAE and ViT-tiny by MAE on the pictures of DATA/train, then kNN, linear probing and
# fine-tuning, against random weights and training from scratch by the same recipes, over several seeds.
#
#   benchmarks/representation.sh DATA OUT        DATA: train/ and val/ of class folders
#
# Killed or stopped, the same command goes on: what is finished is skipped, what was begun is resumed. The table is
# OUT/table.md. From the environment: SEEDS="0 1 2", EPOCHS (pretraining) 60, FINETUNE 10, PROBE 10, SIZE 96,
# MODELS="fcmae_atto mae_vit_tiny", BATCH 128 (pretraining; 64, or as many if fewer, are probed and fine-tuned), PYTHON.
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "usage: [SEEDS='0 1 2'] [EPOCHS=60] $0 DATA OUT [key=value of every run ...]" >&2
    exit 2
fi
data=$1 out=$2
shift 2
for part in train val; do
    [ -d "$data/$part" ] || { echo "$data/$part is no folder: DATA must hold train/ and val/ of class folders" >&2; exit 2; }
done
seeds=${SEEDS:-0 1 2} epochs=${EPOCHS:-60} tuned=${FINETUNE:-10} probed=${PROBE:-10} size=${SIZE:-96}
models=${MODELS:-fcmae_atto mae_vit_tiny} batch=${BATCH:-128} python=${PYTHON:-python}
configs=$(dirname "$0")/../configs
small() { echo $(($1 < $2 ? $1 : $2)); }
warm() { "$python" -c "print($1 / 10)"; }  # a tenth of the epochs

settings="epochs $epochs, fine-tuning $tuned, probe $probed, $size px, batch $batch, data $data $*"
mkdir -p "$out"
if [ -f "$out/settings" ] && [ "$(cat "$out/settings")" != "$settings" ]; then
    echo "$out holds runs of other settings ($(cat "$out/settings")); choose another OUT" >&2
    exit 2
fi
echo "$settings" > "$out/settings.$$"
mv "$out/settings.$$" "$out/settings"  # whole at every moment: others may share OUT

labelled=("data.train=$data/train" "data.val=$data/val" "model.image_size=$size" "$@")

run() {  # run FOLDER FILE COMMAND...: unless FILE tells that it is finished
    local folder=$1 last=$2
    shift 2
    if [ -f "$folder/$last" ]; then
        echo "finished: $folder"
    else
        echo "--- $folder"
        "$python" -m "$@" "out=$folder"
    fi
}

measure() {  # measure FOLDER SEED DECAY key=value...: kNN, probe and fine-tuning of one start
    local folder=$1 seed=$2 decay=$3
    shift 3
    run "$folder/knn" results.json fcmae.probe "$configs/probe/knn.yaml" --mode knn "seed=$seed" "$@" "${labelled[@]}"
    run "$folder/linear" results.json fcmae.probe "$configs/probe/small.yaml" --mode linear "seed=$seed" "$@" \
        "${labelled[@]}" "train.epochs=$probed" "train.warmup_epochs=$(warm "$probed")" "train.batch_size=$(small "$batch" 64)"
    run "$folder/finetune" results.json fcmae.finetune "$configs/finetune/small.yaml" "seed=$seed" "$@" \
        "${labelled[@]}" "train.epochs=$tuned" "train.warmup_epochs=$(warm "$tuned")" "train.batch_size=$(small "$batch" 64)" \
        "train.layer_decay=$decay" "eval.every=$tuned"  # the table reads the end alone
}

for seed in $seeds; do
    for model in $models; do
        case $model in
            fcmae_*) name=convnextv2_atto decay=0.9 ;;
            *) name=vit_tiny_patch16_224 decay=0.75 ;;
        esac
        here=$out/$model/seed_$seed
        run "$here/pretrain" encoder.safetensors fcmae.pretrain "$configs/representation/$model.yaml" "seed=$seed" \
            "data.source=$data/train" "model.image_size=$size" "train.epochs=$epochs" \
            "train.warmup_epochs=$(warm "$epochs")" "train.batch_size=$batch" "$@"
        measure "$here/pretrained" "$seed" "$decay" "init=$here/pretrain/encoder.safetensors"
        # From scratch there are no layers that know something: one learning rate for all.
        measure "$here/random" "$seed" null "model.name=$name"
    done
done
"$python" "$(dirname "$0")/representation.py" "$out" | tee "$out/table.part"
mv "$out/table.part" "$out/table.md"
