export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
timeout 75 python3 bench/tune_scan.py --seconds 65 2>&1 | grep -v "out of resource" | tee $OUT/tune.log
cp bench/results/tune_scan_*.json $OUT/
timeout 140 python3 bench/gpu_acceptance.py --only latency --minutes 2
cp bench/results/gpu_acceptance*.json $OUT/
