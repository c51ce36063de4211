export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
timeout 150 python3 bench/tune_scan.py --seconds 130 2>&1 | grep -v "out of resource" | tee $OUT/tune.log
cp bench/results/tune_scan_*.json $OUT/
URM_TEST_DEVICE=cuda timeout 80 python3 -m pytest python_tests -q -n 14 --maxfail=80 -p no:cacheprovider -k "triton" > $OUT/tests.log 2>&1
tail -12 $OUT/tests.log | cut -c1-200
