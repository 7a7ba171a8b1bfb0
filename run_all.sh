#!/usr/bin/env bash
# Every experiment of the two papers, one row each, under the papers' own headings.
#
#   bash run_all.sh                     run what has no result.json under results/ yet; continue what was stopped
#   bash run_all.sh 2-table1 164        only the rows of a heading (by its tag), or whose name contains a word
#   LIST=1 bash run_all.sh              print the runs (name, the papers' figures, command) and run nothing
#   SEEDS="1 2" bash run_all.sh         these seeds for every row, instead of as many as the paper has
#   SHARD=2/8 bash run_all.sh           every eighth run, from the second on: eight GPUs or machines share the work
#   JOBS=4 bash run_all.sh              four runs side by side: small nets do not fill a large GPU
#   LAUNCH="torchrun --nproc_per_node=8" bash run_all.sh 2-table5       what starts the ImageNet rows, instead of python
#   SMOKE=1 bash run_all.sh             each row once: a few steps on small synthetic images, CIFAR's nets at depth 20
#
# [1] Deep Residual Learning for Image Recognition   [2] Identity Mappings in Deep Residual Networks
# The paper's figure is the test error in %; [2] says fail above 20 %, and - stands for one that it does not report.
# In [2] every figure is the median of 5 runs; in [1] ResNet-110 was run 5 times (6.43 the lowest, 6.61 the mean).
# [1] warms up ResNet-110 alone, [2] every net; --warmup 0 says so. That ResNet-1202 and, in both papers' tables,
# plain-110 warm up too is our choice. On ImageNet the figures are top-1 and, after the comma, top-5 error, under the
# protocol of the row's first table (--test; the single crop of 224 is always evaluated).

set -u
cd "$(dirname "$0")" || exit 1

short="--iterations 1600 --batch-size 32 --micro-batch 32 --lr 0.05 --warmup 100"

rows="
# tags                               paper      seeds  name                                     flags

# [2] Table 1: shortcuts, ResNet-110
2-table1,2-table2,2-table3,2-table4,1-table6,open 6.61,6.43 5 cifar10/110                            --depth 110 --unit basic
2-table1,1-fig6                      fail       5      cifar10/110-plain                        --depth 110 --unit basic-plain
2-table1                             fail       5      cifar10/110-constant-scaling-0.5-1       --depth 110 --unit basic-constant-scaling --unit-arg shortcut_scale=0.5 --unit-arg residual_scale=1
2-table1                             12.35      5      cifar10/110-constant-scaling-0.5-0.5     --depth 110 --unit basic-constant-scaling --unit-arg shortcut_scale=0.5 --unit-arg residual_scale=0.5
2-table1                             fail       5      cifar10/110-exclusive-gating-0           --depth 110 --unit basic-exclusive-gating --unit-arg gate_bias=0
2-table1                             fail       5      cifar10/110-exclusive-gating-1           --depth 110 --unit basic-exclusive-gating --unit-arg gate_bias=-1
2-table1                             fail       5      cifar10/110-exclusive-gating-2           --depth 110 --unit basic-exclusive-gating --unit-arg gate_bias=-2
2-table1                             fail       5      cifar10/110-exclusive-gating-3           --depth 110 --unit basic-exclusive-gating --unit-arg gate_bias=-3
2-table1                             fail       5      cifar10/110-exclusive-gating-4           --depth 110 --unit basic-exclusive-gating --unit-arg gate_bias=-4
2-table1                             fail       5      cifar10/110-exclusive-gating-5           --depth 110 --unit basic-exclusive-gating --unit-arg gate_bias=-5
2-table1,open                        8.70       5      cifar10/110-exclusive-gating-6           --depth 110 --unit basic-exclusive-gating --unit-arg gate_bias=-6
2-table1                             9.81       5      cifar10/110-exclusive-gating-7           --depth 110 --unit basic-exclusive-gating --unit-arg gate_bias=-7
2-table1                             -          5      cifar10/110-exclusive-gating-8           --depth 110 --unit basic-exclusive-gating --unit-arg gate_bias=-8
2-table1                             -          5      cifar10/110-exclusive-gating-9           --depth 110 --unit basic-exclusive-gating --unit-arg gate_bias=-9
2-table1                             -          5      cifar10/110-exclusive-gating-10          --depth 110 --unit basic-exclusive-gating --unit-arg gate_bias=-10
2-table1                             12.86      5      cifar10/110-shortcut-gating-0            --depth 110 --unit basic-shortcut-gating --unit-arg gate_bias=0
2-table1                             6.91       5      cifar10/110-shortcut-gating-6            --depth 110 --unit basic-shortcut-gating --unit-arg gate_bias=-6
2-table1                             12.22      5      cifar10/110-conv-shortcut                --depth 110 --unit basic-conv-shortcut
2-table1,open                        fail       5      cifar10/110-dropout-shortcut             --depth 110 --unit basic-dropout-shortcut

# [2] Table 2: the order of activations, ResNet-110 and ResNet-164
2-table2                             8.17       5      cifar10/110-bn-after-add                 --depth 110 --unit basic-bn-after-add
2-table2                             7.84       5      cifar10/110-relu-before-add              --depth 110 --unit basic-relu-before-add
2-table2                             6.71       5      cifar10/110-relu-preact                  --depth 110 --unit basic-relu-preact
2-table2,2-table3,open               6.37       5      cifar10/110-preact                       --depth 110 --unit basic-preact
2-table2,2-table3                    5.93       5      cifar10/164                              --depth 164 --unit bottleneck
2-table2                             6.50       5      cifar10/164-bn-after-add                 --depth 164 --unit bottleneck-bn-after-add
2-table2                             6.14       5      cifar10/164-relu-before-add              --depth 164 --unit bottleneck-relu-before-add
2-table2                             5.91       5      cifar10/164-relu-preact                  --depth 164 --unit bottleneck-relu-preact
2-table2,2-table3,2-table4           5.46       5      cifar10/164-preact                       --depth 164 --unit bottleneck-preact

# [2] Table 3: original and pre-activation nets
2-table3                             9.90       5      cifar10/110-single                       --depth 110 --unit single
2-table3                             8.91       5      cifar10/110-single-preact                --depth 110 --unit single-preact
2-table3                             7.61       5      cifar10/1001                             --depth 1001 --unit bottleneck
2-table3,2-table4                    4.92       5      cifar10/1001-preact                      --depth 1001 --unit bottleneck-preact
2-table3,2-table4                    25.16      5      cifar100/164                             --dataset cifar100 --depth 164 --unit bottleneck
2-table3,2-table4                    24.33      5      cifar100/164-preact                      --dataset cifar100 --depth 164 --unit bottleneck-preact
2-table3,2-table4                    27.82      5      cifar100/1001                            --dataset cifar100 --depth 1001 --unit bottleneck
2-table3,2-table4                    22.71      5      cifar100/1001-preact                     --dataset cifar100 --depth 1001 --unit bottleneck-preact

# [2] Table 4: comparison; the batch of 64 is that of the code that the authors published
2-table4                             4.62       5      cifar10/1001-preact-batch64              --depth 1001 --unit bottleneck-preact --recipe resnet-1k-layers

# [1] Table 6: CIFAR-10
1-table6                             8.75       1      cifar10/20                               --depth 20 --unit basic --warmup 0
1-table6                             7.51       1      cifar10/32                               --depth 32 --unit basic --warmup 0
1-table6                             7.17       1      cifar10/44                               --depth 44 --unit basic --warmup 0
1-table6                             6.97       1      cifar10/56                               --depth 56 --unit basic --warmup 0
1-table6,2-table4                    7.93       1      cifar10/1202                             --depth 1202 --unit basic

# [1] Fig. 6: plain nets (read off the curves; plain-110 is above 60 % and not drawn)
1-fig6                               9.69       1      cifar10/20-plain                         --depth 20 --unit basic-plain --warmup 0
1-fig6                               10.08      1      cifar10/32-plain                         --depth 32 --unit basic-plain --warmup 0
1-fig6                               11.4       1      cifar10/44-plain                         --depth 44 --unit basic-plain --warmup 0
1-fig6                               13.2       1      cifar10/56-plain                         --depth 56 --unit basic-plain --warmup 0

# ImageNet, [1] Table 2: plain and residual nets (option A), 10-crop; the curves of [1] Fig. 4
1-table2                             27.94      1      imagenet/18-plain                        --depth 18 --unit basic-plain --test 10-crop
1-table2,1-table3                    28.54,10.02 1      imagenet/34-plain                        --depth 34 --unit basic-plain --test 10-crop
1-table2                             27.88      1      imagenet/18-A                            --depth 18 --unit basic --unit-arg option=A --test 10-crop
1-table2,1-table3                    25.03,7.76 1      imagenet/34-A                            --depth 34 --unit basic --unit-arg option=A --test 10-crop

# [1] Tables 3 (10-crop) and 4 (multi-scale)
1-table3,1-table4                    24.52,7.46 1      imagenet/34-B                            --depth 34 --unit basic --test 10-crop,multi-scale
1-table3,1-table4                    24.19,7.40 1      imagenet/34-C                            --depth 34 --unit basic --unit-arg option=C --test 10-crop,multi-scale
1-table3,1-table4                    22.85,6.71 1      imagenet/50                              --depth 50 --unit bottleneck --test 10-crop,multi-scale
1-table3,1-table4,2-section5         21.75,6.05 1      imagenet/101                             --depth 101 --unit bottleneck --test 10-crop,multi-scale
1-table3,1-table4,2-table5           21.43,5.71 2      imagenet/152                             --depth 152 --unit bottleneck --test 10-crop,multi-scale,1-crop-320

# [1] Table 5: six nets of different depth, two of them ResNet-152; which the others were is not said
1-table5                             -,3.57     1      imagenet/ensemble                        --evaluate imagenet/34-B/seed1 imagenet/34-C/seed1 imagenet/50/seed1 imagenet/101/seed1 imagenet/152/seed1 imagenet/152/seed2 --test multi-scale

# [2] Table 5: tested on a single crop of 320
2-table5                             21.1,5.5   1      imagenet/152-preact                      --depth 152 --unit bottleneck-preact --test 1-crop-320
2-table5                             21.8,6.0   1      imagenet/200                             --depth 200 --unit bottleneck --test 1-crop-320
2-table5                             20.7,5.3   1      imagenet/200-preact                      --depth 200 --unit bottleneck-preact --test 1-crop-320
2-table5                             20.1,4.8   1      imagenet/200-preact-scale-aspect         --depth 200 --unit bottleneck-preact --augment scale-aspect --test 1-crop-320

# [2] Section 5: ResNet-101 on a single crop of 224; its nets with other shortcuts the authors halted
2-section5                           24.6,7.5   1      imagenet/101-bn-after-add                --depth 101 --unit bottleneck-bn-after-add
2-section5                           -          1      imagenet/101-constant-scaling-0.5-0.5    --depth 101 --unit bottleneck-constant-scaling --unit-arg shortcut_scale=0.5 --unit-arg residual_scale=0.5
2-section5                           -          1      imagenet/101-exclusive-gating-6          --depth 101 --unit bottleneck-exclusive-gating --unit-arg gate_bias=-6
2-section5                           -          1      imagenet/101-shortcut-gating-6           --depth 101 --unit bottleneck-shortcut-gating --unit-arg gate_bias=-6
2-section5                           -          1      imagenet/101-conv-shortcut               --depth 101 --unit bottleneck-conv-shortcut
2-section5                           -          1      imagenet/101-dropout-shortcut            --depth 101 --unit bottleneck-dropout-shortcut

# Open choices: what the papers do not say, done the other way (ResNet-110; README has them all)
open                                 8.70       5      cifar10/110-exclusive-gating-6-gate-bn   --depth 110 --unit basic-exclusive-gating --unit-arg gate_bias=-6 --unit-arg gate_bn=true
open                                 6.37       5      cifar10/110-preact-raw-shortcut          --depth 110 --unit basic-preact-raw-shortcut
open                                 fail       5      cifar10/110-rescaled-dropout             --depth 110 --unit basic-rescaled-dropout
open                                 6.61       5      cifar10/110-decay-all                    --depth 110 --unit basic --decay-all
open                                 6.61       5      cifar10/110-fan-in                       --depth 110 --unit basic --fan-in

# Not the papers' tables, but an evening on a laptop: the units beside each other in minutes a run
short                                -          3      short/38-plain                           --depth 38 --unit basic-plain $short
short                                -          3      short/38                                 --depth 38 --unit basic $short
short                                -          3      short/38-bn-after-add                    --depth 38 --unit basic-bn-after-add $short
short                                -          3      short/38-relu-before-add                 --depth 38 --unit basic-relu-before-add $short
short                                -          3      short/38-relu-preact                     --depth 38 --unit basic-relu-preact $short
short                                -          3      short/38-preact                          --depth 38 --unit basic-preact $short
short                                -          3      short/38-constant-scaling-0.5-0.5        --depth 38 --unit basic-constant-scaling --unit-arg shortcut_scale=0.5 --unit-arg residual_scale=0.5 $short
short                                -          3      short/38-constant-scaling-0.5-1          --depth 38 --unit basic-constant-scaling --unit-arg shortcut_scale=0.5 --unit-arg residual_scale=1 $short
short                                -          3      short/38-exclusive-gating-6              --depth 38 --unit basic-exclusive-gating --unit-arg gate_bias=-6 $short
short                                -          3      short/38-exclusive-gating-0              --depth 38 --unit basic-exclusive-gating --unit-arg gate_bias=0 $short
short                                -          3      short/38-shortcut-gating-6               --depth 38 --unit basic-shortcut-gating --unit-arg gate_bias=-6 $short
short                                -          3      short/38-shortcut-gating-0               --depth 38 --unit basic-shortcut-gating --unit-arg gate_bias=0 $short
short                                -          3      short/38-conv-shortcut                   --depth 38 --unit basic-conv-shortcut $short
short                                -          3      short/38-dropout-shortcut                --depth 38 --unit basic-dropout-shortcut $short
short                                -          3      short/38-single                          --depth 38 --unit single $short
short                                -          3      short/38-single-preact                   --depth 38 --unit single-preact $short
"
rows=$(sed '/^#/d; /^ *$/d' <<<"$rows")
all_tags=' '$(cut -d' ' -f1 <<<"$rows" | tr , '\n' | sort -u | tr '\n' ' ')

selected() { # does a word of the command line select the row with these tags and this name?
    local tags=$1 name=$2 word
    shift 2
    [ $# = 0 ] && return 0
    for word; do
        if [[ $all_tags = *" $word "* ]]; then
            [[ ,$tags, = *",$word,"* ]] && return 0
        else
            [[ $name = *"$word"* ]] && return 0
        fi
    done
    return 1
}

fail() {
    echo "run_all.sh: $1" >&2
    exit 2
}

shard=${SHARD:-1/1}
[[ $shard =~ ^([1-9][0-9]*)/([1-9][0-9]*)$ ]] && i=${BASH_REMATCH[1]} n=${BASH_REMATCH[2]} && [ "$i" -le "$n" ] ||
    fail "SHARD is $shard, but should be like 2/8: which of how many"
[[ ${JOBS:-1} =~ ^[1-9][0-9]*$ ]] || fail "JOBS is '$JOBS', but should be a whole number"
[[ ${SEEDS:-1} =~ ^[0-9]+( +[0-9]+)*$ ]] || fail "SEEDS is '$SEEDS', but should be like '1 2': whole numbers"

results=results smoke=
if [ -n "${SMOKE:-}" ]; then
    results=$(mktemp -d)
    trap 'rm -rf "$results"' EXIT
    SEEDS=1
    export OMP_NUM_THREADS=1
    smoke="--dataset synthetic --batch-size 8 --micro-batch 4"
fi

names=$(awk '{print $4}' <<<"$rows")
for word; do
    [[ $all_tags = *" $word "* || $names = *"$word"* ]] ||
        fail "no row's name contains $word; the headings' tags are$all_tags"
done

# The runs: the first seed of every row, then the second of every row, so that a table fills evenly.
runs=() averages=()
for ((k = 0; ; k++)); do
    before=${#runs[@]}
    while read -r tags paper count name flags; do
        selected "$tags" "$name" "$@" || continue
        read -ra seeds <<<"${SEEDS:-1 2 3 4 5}"
        [ -n "${SEEDS:-}" ] || seeds=("${seeds[@]:0:count}")
        [ "$k" -lt "${#seeds[@]}" ] || continue
        run=$name/seed${seeds[k]}
        case "$name $flags" in
            *--evaluate*) # of other rows' runs, so after all of them
                [ -z "$smoke" ] || flags=${flags//seed2/seed1}
                command="${LAUNCH:-python} imagenet_train.py ${flags// imagenet\// $results/imagenet/}"
                [ "$k" = 0 ] && averages+=("$run $paper $command --out $results/$run")
                continue
                ;;
            imagenet/*)
                command="${LAUNCH:-python} imagenet_train.py $flags --seed ${seeds[k]}"
                command+=${smoke:+ $smoke --images 16 --crop 32 --epochs 1 --workers 0}
                ;;
            *)
                command="python cifar_train.py $flags --seed ${seeds[k]}"
                command+=${smoke:+ $smoke --images 64 --depth 20 --iterations 4}
                ;;
        esac
        runs+=("$run $paper $command --out $results/$run")
    done <<<"$rows"
    [ ${#runs[@]} -gt "$before" ] || break
done
runs+=(${averages[@]+"${averages[@]}"})

run() { # one run, its own child; a line in $failed if it fails
    local name paper command child status lacking stopped=
    read -r name paper command <<<"$1"
    [ -e "$results/$name/result.json" ] && return
    lacking=$(lacking "$command")
    [ -z "$lacking" ] || {
        echo "$name waits for the runs that it averages: ${lacking//$'\n'/ }"
        [ -z "$smoke" ] || echo "  $name" >>"$failed"
        return
    }
    echo "$name (the paper: $paper): $command"
    $command &
    child=$!
    trap 'stopped=1; kill -TERM $child' INT TERM # it saves its state and ends
    wait $child
    status=$?
    while kill -0 $child 2>/dev/null; do # a signal cut the waiting short
        wait $child
        status=$?
    done
    case $status in
        0) return ;;
        130 | 143 | 1) [ -n "$stopped" ] && return ;; # the next call continues it; stopped, torchrun itself says 1
        2) busy "$results/$name" && echo "$name: left to the program that is running it" && return ;;
    esac
    echo "  $name (exit status $status)" >>"$failed"
}

lacking() { # the runs that a command evaluates and that have not finished
    local word
    [[ $1 = *--evaluate* ]] && for word in ${1%--out*}; do
        [[ $word != */seed* || -e $word/result.json ]] || echo "$word"
    done
}

busy() { # does another program hold the run's folder?
    command -v flock >/dev/null && [ -e "$1/.lock" ] && ! flock -n "$1/.lock" true
}

if [ -n "${LIST:-}" ]; then
    for ((r = i - 1; r < ${#runs[@]}; r += n)); do
        read -r name paper command <<<"${runs[r]}"
        printf '%-44s %-10s %s\n' "$name" "$paper" "$command"
    done
    exit
fi

failed=$(mktemp)
trap 'rm -rf "$failed" ${smoke:+"$results"}' EXIT
trap 'stopped=130' INT
trap 'stopped=143' TERM
stopped=
jobs=${JOBS:-1} cores=$(getconf _NPROCESSORS_ONLN)
[ "$jobs" = 1 ] || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > jobs ? cores / jobs : 1))}"
for ((r = i - 1; r < ${#runs[@]}; r += n)); do
    # an average waits for the runs before it
    while [ -z "$stopped" ] && [[ ${runs[r]} = *--evaluate* ]] && [ -n "$(jobs -rp)" ]; do wait -n || sleep 0.1; done
    run "${runs[r]}" &
    while [ -z "$stopped" ] && [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n || sleep 0.1; done
    [ -z "$stopped" ] || break
done
while [ -z "$stopped" ] && [ -n "$(jobs -rp)" ]; do wait -n || sleep 0.1; done
if [ -n "$stopped" ]; then
    trap '' INT TERM
    jobs -rp | xargs kill -TERM 2>/dev/null
    wait
    echo "stopped; the same command continues" >&2
    exit "$stopped"
fi
[ ! -s "$failed" ] || {
    printf 'failed:\n%s\n' "$(cat "$failed")" >&2
    exit 1
}
