// Runs a model that AOTInductor has compiled, without Python:
//
//   serve_compiled OPERATORS MODEL INPUTS OUTPUT
//
// OPERATORS is amtl_kernels/_C.abi3.so, MODEL what torch._inductor.aoti_compile_and_package wrote,
// and INPUTS a tuple of tensors from torch.save. OUTPUT gets the model's first tensor.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <fstream>
#include <iostream>
#include <iterator>

int main(int argc, char** argv) {
  if (argc != 5) return std::cerr << "usage: serve_compiled OPERATORS MODEL INPUTS OUTPUT\n", 2;
  void* operators = dlopen(argv[1], RTLD_NOW);
  if (operators == nullptr) return std::cerr << dlerror() << "\n", 1;
  reinterpret_cast<int (*)()>(dlsym(operators, "amtl_define_operators"))();
  try {
    torch::inductor::AOTIModelPackageLoader model(argv[2]);
    std::ifstream file(argv[3], std::ios::binary);
    const std::vector<char> bytes(std::istreambuf_iterator<char>(file), {});
    std::vector<at::Tensor> inputs;
    const c10::IValue given = torch::jit::pickle_load(bytes);
    for (const c10::IValue& each : given.toTupleRef().elements()) {
      inputs.push_back(each.toTensor());
    }
    const std::vector<char> saved = torch::jit::pickle_save(model.run(inputs)[0]);
    std::ofstream(argv[4], std::ios::binary).write(saved.data(), saved.size());
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
}
