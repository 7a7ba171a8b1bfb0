#!/usr/bin/env bash
# Every experiment of the two papers, one row each, under the headings of the papers' tables.
#
#   bash run_all.sh                     run what has no result.json under results/ yet; continue what was stopped
#   bash run_all.sh 2-table1 164        run the rows of a table (by its tag) and the rows whose name contains a word
#   bash run_all.sh cifar10/110         run one row, by its whole name; cifar10/110/seed1 is one run of it
#   LIST=1 bash run_all.sh              start nothing, but list the runs: their commands, what they cost, which are done
#   SEEDS="1 2" bash run_all.sh         run these seeds of every row, instead of as many as the paper has
#   OUT=DIR bash run_all.sh             put the runs into a folder of your own, instead of results/
#   SHARD=2/8 bash run_all.sh           do every eighth run, from the second on: eight GPUs or machines share the work
#   JOBS=4 bash run_all.sh              do four runs at a time, spread over the GPUs that CUDA_VISIBLE_DEVICES allows
#                                       (how several share one GPU: results/speed.md)
#   LAUNCH="torchrun --nproc_per_node=8" bash run_all.sh 2-table5       start ImageNet and detection rows so, each on all GPUs
#   FLAGS="--precision bf16 --data DIR" bash run_all.sh imagenet/50     add flags of the machine (docs/imagenet.md lists them)
#   SMOKE=1 bash run_all.sh             try each row: a few steps on small synthetic images, CIFAR nets at depth 20;
#                                       what ran is printed, and nothing is kept
#
# [1] Deep Residual Learning for Image Recognition   [2] Identity Mappings in Deep Residual Networks
# The paper's number is the test error in %; [2] says "fail" above 20 %, and "-" stands where the paper reports none.
# In [2] CIFAR's numbers are medians of 5 runs; in [1] ResNet-110 was run 5 times (6.43 the lowest, 6.61 the mean).
# [1] warms up ResNet-110 alone, [2] every net; [1]'s other nets have --warmup 0. It is our choice that ResNet-1202, and
# plain-110 in both papers' tables, warm up too. On ImageNet the numbers are top-1 and, after the comma, top-5 error,
# under the protocol of the row's first table (--test; the single crop of 224 is always evaluated).

[ -n "${BASH_VERSION:-}" ] || {
    echo "run_all.sh: start it with bash, not sh" >&2
    exit 2
}
set -u
unset CDPATH # with it, cd may go elsewhere and print where
[[ " $* " != *" --help "* && " $* " != *" -h "* ]] || {
    sed -n '2,/^\[ -n /s/^# \{0,1\}//p' "$0"
    exit
}
here=$(cd "$(dirname "$(realpath "$0")")" && pwd) || exit 1
results=${OUT:-results}
[[ $results = /* || -z ${OUT:-} || $PWD = "$here" ]] || results=$PWD/$results
cd "$here" || exit 1
export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-2000}" # OpenMP's spinning threads make a busy machine several times slower

short="--iterations 1600 --batch-size 32 --micro-batch 32 --lr 0.05 --warmup 100"
long=${short/1600/6400}

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

# [2] Table 4: comparison (a batch of 64 as in the code that the authors published)
2-table4                             4.62       5      cifar10/1001-preact-batch64              --depth 1001 --unit bottleneck-preact --recipe resnet-1k-layers

# [1] Table 6: CIFAR-10
1-table6                             8.75       1      cifar10/20                               --depth 20 --unit basic --warmup 0
1-table6                             7.51       1      cifar10/32                               --depth 32 --unit basic --warmup 0
1-table6                             7.17       1      cifar10/44                               --depth 44 --unit basic --warmup 0
1-table6                             6.97       1      cifar10/56                               --depth 56 --unit basic --warmup 0
1-table6,2-table4                    7.93       1      cifar10/1202                             --depth 1202 --unit basic

# [1] Fig. 6: plain nets (numbers read off the curves; plain-110 is above 60 % and not drawn)
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

# [1] Table 5: six nets of different depth, two of them ResNet-152 (the paper does not name the others)
1-table5                             -,3.57     1      imagenet/ensemble                        --evaluate imagenet/34-B/seed1 imagenet/34-C/seed1 imagenet/50/seed1 imagenet/101/seed1 imagenet/152/seed1 imagenet/152/seed2 --test multi-scale

# [2] Table 5: tested on a single crop of 320
2-table5                             21.1,5.5   1      imagenet/152-preact                      --depth 152 --unit bottleneck-preact --test 1-crop-320
2-table5                             21.8,6.0   1      imagenet/200                             --depth 200 --unit bottleneck --test 1-crop-320
2-table5                             20.7,5.3   1      imagenet/200-preact                      --depth 200 --unit bottleneck-preact --test 1-crop-320
2-table5                             20.1,4.8   1      imagenet/200-preact-stride-on-3x3-scale-aspect --depth 200 --unit bottleneck-preact-stride-on-3x3 --augment scale-aspect --test 1-crop-320

# [2] Section 5: ResNet-101 on a single crop of 224; the authors halted those with other shortcuts
2-section5                           24.6,7.5   1      imagenet/101-bn-after-add                --depth 101 --unit bottleneck-bn-after-add
2-section5                           -          1      imagenet/101-constant-scaling-0.5-0.5    --depth 101 --unit bottleneck-constant-scaling --unit-arg shortcut_scale=0.5 --unit-arg residual_scale=0.5
2-section5                           -          1      imagenet/101-exclusive-gating-6          --depth 101 --unit bottleneck-exclusive-gating --unit-arg gate_bias=-6
2-section5                           -          1      imagenet/101-shortcut-gating-6           --depth 101 --unit bottleneck-shortcut-gating --unit-arg gate_bias=-6
2-section5                           -          1      imagenet/101-conv-shortcut               --depth 101 --unit bottleneck-conv-shortcut
2-section5                           -          1      imagenet/101-dropout-shortcut            --depth 101 --unit bottleneck-dropout-shortcut

# The weights that detectors begin from: see docs/detection.md
# [1] Table 7: detection, PASCAL VOC 2007 test, trained on 07+12: mAP in % (11-point), higher is better
1-table7                             73.2       1      voc/vgg16                                --vgg --weights vgg16-397923af.pth
1-table7                             76.4       1      voc/101                                  --weights R-101.pkl

# [1] Tables 8 and 9: detection, COCO 2014 val, trained on train: mAP@.5 and mAP@[.5,.95] in %, with context by the test refine
1-table8,1-table9                    41.5,21.2  1      coco/vgg16                               --dataset coco --vgg --weights vgg16-397923af.pth
1-table8,1-table9                    48.4,27.2  1      coco/101                                 --dataset coco --weights R-101.pkl --test refine
1-table9                             51.1,30.0  1      coco/101-context                         --dataset coco --weights R-101.pkl --context --test refine,multi-scale

# Open choices: what the papers do not say, done the other way (ResNet-110)
open                                 8.70       5      cifar10/110-exclusive-gating-6-gate-bn   --depth 110 --unit basic-exclusive-gating --unit-arg gate_bias=-6 --unit-arg gate_bn=true
open                                 6.37       5      cifar10/110-preact-raw-shortcut          --depth 110 --unit basic-preact-raw-shortcut
open                                 fail       5      cifar10/110-rescaled-dropout             --depth 110 --unit basic-rescaled-dropout
open                                 6.61       5      cifar10/110-decay-all                    --depth 110 --unit basic --decay-all
open                                 6.61       5      cifar10/110-fan-in                       --depth 110 --unit basic --fan-in

# The short schedule: not a table of the papers, but all units beside each other in minutes a run
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

# Four times as many iterations: do the orders that the short schedule has against the papers come from its length?
short-long                           -          1      short/38-long                            --depth 38 --unit basic $long
short-long                           -          1      short/38-exclusive-gating-6-long         --depth 38 --unit basic-exclusive-gating --unit-arg gate_bias=-6 $long
short-long                           -          1      short/38-single-preact-long              --depth 38 --unit single-preact $long
short-long                           -          1      short/38-conv-shortcut-long              --depth 38 --unit basic-conv-shortcut $long

# Degradation on the short schedule: plain and residual nets of growing depth, as in [1] Figs 1 and 6
short-depth                          -          3      short/20-plain                           --depth 20 --unit basic-plain $short
short-depth                          -          3      short/32-plain                           --depth 32 --unit basic-plain $short
short-depth                          -          3      short/44-plain                           --depth 44 --unit basic-plain $short
short-depth                          -          3      short/56-plain                           --depth 56 --unit basic-plain $short
short-depth                          -          3      short/20                                 --depth 20 --unit basic $short
short-depth                          -          3      short/32                                 --depth 32 --unit basic $short
short-depth                          -          3      short/44                                 --depth 44 --unit basic $short
short-depth                          -          3      short/56                                 --depth 56 --unit basic $short

# 1,001 layers on the short schedule: the original and the full pre-activation unit, as in [2] Fig. 1 right
short-1001                           -          1      short/164                                --depth 164 --unit bottleneck $short
short-1001                           -          1      short/164-preact                         --depth 164 --unit bottleneck-preact $short
short-1001                           -          1      short/1001                               --depth 1001 --unit bottleneck $short
short-1001                           -          1      short/1001-preact                        --depth 1001 --unit bottleneck-preact $short
"
names=$'\n'$(awk '/^[^#]/ {print $4}' <<<"$rows")$'\n'
all_tags=' '$(awk '/^[^#]/ {print $1}' <<<"$rows" | tr , '\n' | sort -u | tr '\n' ' ')

fail() {
    echo "run_all.sh: $1" >&2
    exit 2
}

shard=${SHARD:-1/1}
[[ $shard =~ ^([1-9][0-9]{0,8})/([1-9][0-9]{0,8})$ ]] && i=${BASH_REMATCH[1]} n=${BASH_REMATCH[2]} && [ "$i" -le "$n" ] ||
    fail "SHARD is '$shard', but should be like 2/8: which of how many"
jobs=${JOBS:-1}
[[ $jobs =~ ^[1-9][0-9]{0,3}$ ]] || fail "JOBS is '$jobs', but should be a whole number up to 9999"
[[ ${SEEDS:-1} =~ ^\ *[0-9]+(\ +[0-9]+)*\ *$ ]] || fail "SEEDS is '$SEEDS', but should be like '1 2': whole numbers"
set -f
eval "launch=(${LAUNCH:-python})" 2>/dev/null && [ ${#launch[@]} != 0 ] ||
    fail "LAUNCH is '$LAUNCH', but should be a command"
eval "extra=(${FLAGS:-})" 2>/dev/null || fail "FLAGS is '$FLAGS', but should be flags"
set +f
[[ $jobs = 1 || -z ${LAUNCH:-} ]] || fail "JOBS and LAUNCH: what LAUNCH starts takes all GPUs, so leave one of the two out"
value= # is the next word of FLAGS a flag's value?
for word in ${extra[@]+"${extra[@]}"}; do
    if [[ -n $value ]]; then
        value=
    elif [[ $word =~ ^--(data|workers|device|precision|timeout|checkpoint-seconds)(=|$) ]]; then
        [[ $word = *=* ]] || value=$word
    elif [[ $word != --compile ]]; then
        fail "FLAGS has '$word', but a row takes --data, --workers, --device, --precision, --timeout, --checkpoint-seconds and --compile alone (CIFAR's no --workers, detection's no --compile)"
    fi
done
[[ -z $value ]] || fail "FLAGS ends with $value, which needs a value"

is_row() { [[ $names = *$'\n'"$1"$'\n'* ]]; }

for word; do
    [[ -n $word && ($all_tags = *" $word "* || $names = *"$word"*) ]] ||
        { [[ $word =~ ^(.*)/seed[0-9]+$ ]] && is_row "${BASH_REMATCH[1]}"; } ||
        fail "no row's name contains '$word'; the tables' tags are$all_tags"
done

smoke=
if [[ -n ${SMOKE:-} && -z ${LIST:-} ]]; then
    SEEDS=1
    export OMP_NUM_THREADS=1
    smoke="--dataset synthetic"
fi

seeds_of() { # the seeds of a row (its tags, number of runs and name) that the words of the command line select
    local tags=$1 name=$3 all="1 2 3 4 5 6 7 8 9" word seed chosen= seeds=
    all=${SEEDS:-${all:0:2 * $2 - 1}}
    shift 3
    [ $# -gt 0 ] || chosen=$all
    for word; do
        if [[ $all_tags = *" $word "* ]]; then
            [[ ,$tags, != *",$word,"* ]] || chosen+=" $all"
        elif is_row "$word"; then
            [ "$name" != "$word" ] || chosen+=" $all"
        elif [[ $word =~ ^(.*)/seed([0-9]+)$ ]] && is_row "${BASH_REMATCH[1]}"; then
            [ "$name" != "${BASH_REMATCH[1]}" ] || chosen+=" ${BASH_REMATCH[2]}"
        elif [[ $name = *"$word"* ]]; then
            chosen+=" $all"
        fi
    done
    for seed in $chosen; do
        [[ " $seeds " = *" $seed "* ]] || seeds+=" $seed"
    done
    echo $seeds
}

# The runs in the order of the table, and the order in which they start: the first seed of every row, then the second
# of every row, so that a table fills evenly. A row that averages other rows' runs has one run, after all of them.
runs=() headings=() order=() heading=
while read -r tags paper count name flags; do
    [ "$tags" != "#" ] || heading="# $paper $count $name $flags"
    [[ -n $tags && $tags != "#" ]] || continue
    turn=0
    [[ $flags != *--evaluate* ]] || turn=999999
    for seed in $(seeds_of "$tags" "$count" "$name" "$@"); do
        [ $turn != 1000000 ] || break
        order+=("$turn ${#runs[@]}") turn=$((turn + 1))
        runs+=("$name/seed$seed $paper $tags $flags") headings+=("$heading")
    done
done <<<"$rows"
order=($(printf '%s\n' "${order[@]}" | sort -n -k1,1 -k2,2 | cut -d' ' -f2 | awk "NR % $n == $i % $n"))

command_of() { # sets a run's name, its paper and tags, and `command`, the words that run it
    local flags word
    read -r name paper tags flags <<<"${runs[$1]}"
    command=(python cifar_train.py)
    [[ $name != imagenet/* ]] || command=("${launch[@]}" imagenet_train.py)
    [[ $name != @(voc|coco)/* ]] || command=("${launch[@]}" detection_train.py)
    [[ -z $smoke || $name != @(voc|coco)/* ]] || flags=$(sed -E 's/--vgg|--weights [^ ]+//g' <<<"$flags") # not there yet
    for word in $flags; do
        [[ $word != imagenet/*/seed* ]] || word=$results/$word
        [ -z "$smoke" ] || word=${word/%seed2/seed1}
        command+=("$word")
    done
    if [[ $flags != *--evaluate* ]]; then
        command+=(${extra[@]+"${extra[@]}"} --seed "${name##*/seed}") # of an average the runs' config.json decides
        [ -z "$smoke" ] || case $name in
            voc/* | coco/*) command+=($smoke --images 8 --iterations 2 --workers 0) ;;
            imagenet/*) command+=($smoke --images 32 --batch-size 16 --micro-batch 2 --crop 32 --epochs 1 --workers 0) ;;
            *) command+=($smoke --images 64 --batch-size 8 --micro-batch 4 --depth 20 --iterations 4) ;;
        esac
    fi
    command+=(--out "$results/$name")
}

quoted() { # the words as one line that a shell reads back as they are
    local word text line=
    for word; do
        [[ $word =~ ^[[:alnum:]_./:=,-]+$ ]] && text=$word || printf -v text %q "$word"
        line+=" $text"
    done
    echo "${line# }"
}

[ ${#order[@]} != 0 ] || {
    echo "SHARD=$shard selects none of the ${#runs[@]} runs"
    exit
}
if [ -n "${LIST:-}" ]; then
    # What was measured (results/costs.csv): CPU seconds an image and peak memory on one thread of an AMD EPYC, in the
    # second of two iterations of one micro-batch; for ImageNet of 4 images, without memory. Evaluations are not counted.
    costs=$'\n'$(awk -F, 'NR > 1 {
        h = $2 * $3 / 3600
        printf "%s about %.*f CPU-hours%s\n", $1, h < 1 ? 2 : h < 10, h, $4 ? sprintf(", %.1f GB", $4 / 1e9) : ""
    }' results/costs.csv)$'\n'
    echo "# name, the paper's number in the first of the row's tables, the command # the tables; what a run costs on a CPU, in"
    echo "# hours of one core, and memory; done. SEEDS=1 lists the runs of seed 1 alone"
    for r in $(printf '%s\n' "${order[@]}" | sort -n); do
        command_of "$r"
        [ "${headings[r]}" = "$heading" ] || printf '\n%s (%s)\n' "${headings[r]}" "${tags%%,*}"
        heading=${headings[r]} row=$'\n'${name%/seed*}
        [[ $costs != *"$row "* ]] || cost=${costs#*"$row "} tags+="; ${cost%%$'\n'*}"
        [ ! -e "$results/$name/result.json" ] || tags+="; done"
        printf '%-44s %-10s %s  # %s\n' "$name" "$paper" "$(quoted "${command[@]}")" "$tags"
    done
    exit
fi

temporary=$(mktemp -d 2>/dev/null) || fail "TMPDIR is '${TMPDIR:-}', where no folder can be made"
trap 'rm -rf "$temporary"' EXIT
failed=$temporary/failed
[ -z "$smoke" ] || results=$temporary
todo=()
for r in "${order[@]}"; do
    command_of "$r"
    [ -e "$results/$name/result.json" ] || todo+=("$r")
done
[ ${#todo[@]} = ${#order[@]} ] ||
    echo "$((${#order[@]} - ${#todo[@]})) of ${#order[@]} runs have a result; SEEDS=\"6 7 8\" or OUT=DIR makes others"
[ ${#todo[@]} != 0 ] || exit 0
for word in python "${launch[0]}"; do
    command -v "$word" >/dev/null || fail "there is no $word: activate the environment that holds it (. venv/bin/activate)"
done

# The GPUs that may be used. A run that starts here takes one of them; what LAUNCH starts keeps all.
IFS=$', \n' read -rd '' -a gpus \
    <<<"${CUDA_VISIBLE_DEVICES-$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | grep -xE '[0-9]+')}"

run() { # a run, as a child of its own, on the GPU of a slot; a line in $failed if it fails
    local name paper tags command word shown child status lacking= stopped= log=$failed.$2
    command_of "$1"
    for word in "${command[@]:0:${#command[@]}-2}"; do
        [[ $word != "$results"/*/seed* || -e $word/result.json ]] || lacking+=" $word"
    done
    [ -z "$lacking" ] || {
        echo "$name waits for the runs that it averages:$lacking"
        [ -z "$smoke" ] || echo "  $name" >>"$failed"
        return
    }
    [[ ${#gpus[@]} = 0 || (-n ${LAUNCH:-} && $name = @(imagenet|voc|coco)/*) ]] ||
        export CUDA_VISIBLE_DEVICES=${gpus[((i - 1) * jobs + $2) % ${#gpus[@]}]}
    if [ -z "$smoke" ]; then
        [ "$paper" = - ] || paper=" (the paper: $paper)"
        echo "$name${paper#-}: $(quoted "${command[@]}")"
        "${command[@]}" &
    else
        "${command[@]}" >"$log" 2>&1 &
    fi
    child=$!
    trap 'stopped=1; kill -TERM $child' INT TERM # it saves its state and ends
    wait $child
    status=$?
    while kill -0 $child 2>/dev/null; do # a signal cut the waiting short
        wait $child
        status=$?
    done
    [ -z "$smoke" ] || case $status in
        0) shown=("${command[@]//"$results/"/}") && echo "$name: ran $(quoted "${shown[@]}")" ;;
        *) log=$(<"$log") && echo "$name: ${log//"$results/"/}" ;; # without the folder, which will be gone
    esac
    case $status in
        0) return ;;
        3) echo "$name: left to the program that is running it" && return ;;
        130 | 143 | 1) [ -z "$stopped" ] || return ;; # the next call continues it; stopped, torchrun itself says 1
    esac
    echo "  $name (exit status $status)" >>"$failed"
}

full() { # does a run occupy each of the JOBS slots? If not, sets `slot` to a free one
    for ((slot = 0; slot < jobs; slot++)); do
        [ -n "${pids[slot]:-}" ] && kill -0 "${pids[slot]}" 2>/dev/null || return 1
    done
}

running() { [ -n "$(jobs -rp)" ]; }

wait_while() { while [ -z "$stopped" ] && "$1"; do wait -n || sleep 0.1; done; }

trap 'stopped=130' INT
trap 'stopped=143' TERM
stopped= pids=() cores=$(getconf _NPROCESSORS_ONLN)
[ "$jobs" = 1 ] || export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > jobs ? cores / jobs : 1))}"
[ "$jobs" = 1 ] || export LOCAL_WORLD_SIZE=$jobs # a job has that part of the cores for what decodes and compiles
for r in "${todo[@]}"; do
    [[ ${runs[r]} != *--evaluate* ]] || wait_while running # an average waits for the runs before it
    wait_while full
    [ -z "$stopped" ] || break
    run "$r" "$slot" &
    pids[slot]=$!
done
wait_while running
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
