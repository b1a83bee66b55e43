#!/bin/bash
# A study of two methods with five folds: submits all jobs with their dependencies.
#   cd /shared/study && bash study.sh     # data/ lies here; every node sees this folder under this path
set -euo pipefail
here=$(dirname "$(realpath "$0")")
export METHODS="two-phase progressive"

# If the files of a case cannot be read, split, preprocess and train end with 1 and process the other cases. So the folds
# need a split file, and of the other jobs only that they have ended (afterany): the next step makes or names what is
# missing. (A case that becomes unreadable after the split stops the folds, which name it: fix it, or split again.)
split=$(sbatch --parsable --cpus-per-task=4 --mem=16G --wrap "kitseg split data --folds 5 --test-cases 20; test -s splits.json")
prepared=$(sbatch --parsable "$here/preprocess.sbatch")
trained=""
for method in $METHODS; do
    folds=$(METHOD=$method sbatch --parsable --dependency="afterok:$split,afterany:$prepared" "$here/folds.sbatch")
    trained+=":$folds"
done
sbatch --dependency="afterany$trained" "$here/choose.sbatch"
