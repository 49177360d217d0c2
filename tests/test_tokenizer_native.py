"""The C++ tokenizer under sanitizers, built without Python (tests/csrc/CMakeLists.txt)."""


def test_random_inputs_under_address_and_undefined_behaviour_sanitizers(build_native):
    assert build_native("address,undefined", "fuzz_bpe", 10_000) == "fuzz_bpe: 10000 inputs\n"


def test_eight_threads_under_the_thread_sanitizer(build_native):
    assert build_native("thread", "threads_bpe").endswith(" 0 wrong\n")
