# Part of ./dev, which sources it: what is run beside the ordinary tests. cpp/README.md, section 13.
#
# Tools that only these commands need; installed when first asked for.
CHECK_TOOLS="atheris==3.0.0 coverage==7.17.3 gcovr==8.8"

# ---- sanitizers --------------------------------------------------------------------------------

# Own targets only: torch stays as it is. -O1 -g1 and the precompiled headers keep it short.
sanitizer_build() { # FOLDER SANITIZERS [TEST FILES]
  say "Building the core and its C++ tests with $2 (the first time about 4 min)"
  use_ccache
  cmake -S . -B "$1" -G Ninja -DPython_EXECUTABLE="$PY" -DCMAKE_BUILD_TYPE=RelWithDebInfo \
    -DCMAKE_CXX_FLAGS_RELWITHDEBINFO="-O1 -g1 -DNDEBUG -D_GLIBCXX_ASSERTIONS" \
    -DCTRLORA_BUILD_PYTHON=OFF -DCTRLORA_BUILD_TESTS=ON -DCTRLORA_SANITIZE="$2" \
    -DCTRLORA_TEST_FILES="${3:-}" >/dev/null
  cmake --build "$1" --parallel "$JOBS" | grep -v 'no work to do' || [ "${PIPESTATUS[0]}" = 0 ]
}

sanitize_address() {
  sanitizer_build build/sanitize/address address,undefined
  ctest --test-dir build/sanitize/address --output-on-failure --parallel "$JOBS" "$@"
}

# What runs on two threads of ours. torch is not instrumented, so what happens inside it is left out
# (thread.supp says what and why). setarch -R: TSan's shadow memory wants addresses not randomised;
# where a container forbids it, they may be few enough as it is.
sanitize_thread() {
  local plain=""
  setarch -R true 2>/dev/null && plain="setarch -R"
  sanitizer_build build/sanitize/thread thread \
    "side_stream_test.cpp;lora_pair_test.cpp;engine_state_test.cpp"
  TSAN_OPTIONS="suppressions=$PWD/tests/sanitize/thread.supp halt_on_error=1" \
    $plain ctest --test-dir build/sanitize/thread --output-on-failure -E kernels_ "$@"
}

# The sanitized core under the ordinary module: the loader looks at LD_LIBRARY_PATH first.
sanitize_python() { # [PYTEST ARGUMENTS]
  build _C
  sanitizer_build build/sanitize/address address,undefined
  [ $# -gt 0 ] || set -- tests/python/test_optimizer.py tests/python/test_faults.py \
    tests/python/test_state.py tests/python/test_init.py tests/python/test_rank_schedule.py \
    tests/python/test_compact.py tests/python/test_layers.py
  # libstdc++ too, else ASan finds no throw to forward to; --capture=sys leaves its report visible.
  LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libstdc++.so)" \
    ASAN_OPTIONS=detect_leaks=0 LD_LIBRARY_PATH=$PWD/build/sanitize/address/cpp OMP_NUM_THREADS=1 \
    "$PY" -m pytest -p no:cacheprovider --timeout 1200 --capture=sys "$@"
}

# The foreign C++ program of tests/embed. valgrind knows no AVX-512, hence the plain kernels.
sanitize_valgrind() { # [STEPS]
  command -v valgrind >/dev/null || die "expected valgrind. Remedy: apt-get install valgrind"
  build _C
  local prefix folder=build/sanitize/valgrind
  prefix=$("$PY" -c 'import pyctrlora; print(pyctrlora.cmake_prefix_path)')
  cmake -S tests/embed -B "$folder" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo \
    -DCMAKE_PREFIX_PATH="$prefix" >/dev/null
  cmake --build "$folder"
  rm -f "$folder/run.pt"
  for run in first resumed; do # the second one loads what the first one saved
    say "valgrind: $run run (about 2 min)"
    OMP_NUM_THREADS=1 ATEN_CPU_CAPABILITY=default valgrind --error-exitcode=1 --quiet \
      --leak-check=full --errors-for-leak-kinds=definite --show-leak-kinds=definite \
      --suppressions=tests/sanitize/valgrind.supp \
      "$folder/ctrlora_embed" LICENSE "$folder/run.pt" $([ $run = first ] && echo 3 || echo 5)
  done
}

run_sanitize() {
  local kind=${1:-address}
  [ $# = 0 ] || shift
  case $kind in
    address | thread | python | valgrind) "sanitize_$kind" "$@" ;;
    *) die "expected address, thread, python or valgrind; got '$kind'" ;;
  esac
}

# ---- the others --------------------------------------------------------------------------------

check_tools() {
  local stamp=$PREFIX/.pyctrlora-check-tools
  [ "$(cat "$stamp" 2>/dev/null)" = "$CHECK_TOOLS" ] && return
  say "Installing $CHECK_TOOLS"
  pip install --constraint "$PREFIX/.pyctrlora-constraint" $CHECK_TOOLS
  echo "$CHECK_TOOLS" >"$stamp"
}

# $PWD on the path: see tests/fuzz/__main__.py.
run_fuzz() { # [TARGET [SECONDS | FILE]]
  check_tools
  build _C
  OMP_NUM_THREADS=1 PYTHONPATH=tests:$PWD "$PY" -m fuzz "$@"
}

# C++ lines of the core by the C++ tests and the Python tests together (the loader finds the counting
# library first), Python lines by the Python tests. Arguments go to pytest.
run_coverage() {
  local folder=build/coverage
  check_tools
  build _C
  say "Building the core and its C++ tests with counters (the first time about 4 min)"
  use_ccache
  cmake -S . -B "$folder" -G Ninja -DPython_EXECUTABLE="$PY" -DCMAKE_BUILD_TYPE=Debug \
    -DCMAKE_CXX_FLAGS_DEBUG="-O0 -g1 -DNDEBUG" -DCTRLORA_BUILD_PYTHON=OFF \
    -DCTRLORA_BUILD_TESTS=ON -DCTRLORA_COVERAGE=ON >/dev/null
  cmake --build "$folder" --parallel "$JOBS" | grep -v 'no work to do' || [ "${PIPESTATUS[0]}" = 0 ]
  find "$folder" -name '*.gcda' -delete
  ctest --test-dir "$folder" --output-on-failure --parallel "$JOBS"
  LD_LIBRARY_PATH=$PWD/$folder/cpp "$PY" -m coverage run --data-file="$folder/python" \
    --source=pyctrlora -m pytest --timeout 1200 "$@"
  "$PY" -m coverage report --data-file="$folder/python" --skip-covered --show-missing |
    tee "$folder/python.txt"
  gcovr --root . --filter cpp/ "$folder/cpp" --txt "$folder/cpp.txt" --txt-metric line
  cat "$folder/cpp.txt"
}

run_mutate() { # [FILES] [--every N] [--list]
  build all -DCTRLORA_BUILD_TESTS=ON
  "$PY" tests/mutation/mutate.py --build "$BUILD" "$@"
}
