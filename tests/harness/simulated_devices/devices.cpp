// Devices of PyTorch that are simulated: values are computed at once by the CPU, time is only counted.
//
// The host has a clock, and each device has one. To tell a device a kernel costs the host
// launch_s. The device begins when it has done all it was told before, and not before it is told.
// Where its queue is full, or where a value is asked for, the host's clock goes on to when the
// device is that far. Times are known when they are told, so nothing sleeps and nothing is random.
//
// As with CUDA: an operator may not meet two devices, a copy between two devices makes both wait
// (ATen/native/cuda/Copy.cu), a copy from or to the host makes the host wait unless it is
// non_blocking, and so does an operator whose result has a size that depends on values.
// Not as with CUDA: memory has no gaps, and a missing wait between streams cannot be seen.

#include <ATen/EmptyTensor.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_local_scalar_dense.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstring>
#include <deque>
#include <mutex>

namespace simulated {

constexpr auto TYPE = c10::DeviceType::PrivateUse1;
constexpr int64_t PAGE = 512;  // CUDA's allocator rounds up to it

// ---- Time and memory
struct Device {
  double free_at = 0;         // when it has done all that it was told
  double busy_s = 0;
  std::deque<double> queue;   // when each kernel in the queue ends
  int64_t bytes = 0;
  int64_t peak_bytes = 0;
  int64_t received = 0;       // copies from other devices
};

struct Speed {
  double launch_s = 1e-5;     // of the host, for a kernel
  double kernel_s = 1e-5;     // of a device, for a kernel
  double flops_per_s = 1e12;  // of a device, for a matrix product, on top
  double copy_s = 1e-5;       // between devices
  int64_t queue_length = 1024;
};

std::mutex mutex;  // of all that follows
std::vector<Device> devices;
Speed speed;
double host_time = 0;
double reset_time = 0;
std::vector<std::string> host_waits;

thread_local int64_t current_device = 0;
// Above 0 while the CPU computes values: what it does for that is no work of a device.
thread_local int inside = 0;

struct Inside {
  Inside() { inside++; }
  ~Inside() { inside--; }
};

void launch(int64_t index, double seconds) {
  std::lock_guard<std::mutex> lock(mutex);
  Device& device = devices.at(index);
  host_time += speed.launch_s;
  if (int64_t(device.queue.size()) >= speed.queue_length) {
    host_time = std::max(host_time, device.queue.front());
  }
  while (!device.queue.empty() && device.queue.front() <= host_time) {
    device.queue.pop_front();
  }
  device.free_at = std::max(device.free_at, host_time) + seconds;
  device.busy_s += seconds;
  device.queue.push_back(device.free_at);
}

// The host waits until a device has done all that it was told.
void wait_for(int64_t index, const std::string& reason) {
  std::lock_guard<std::mutex> lock(mutex);
  host_time = std::max(host_time, devices.at(index).free_at);
  host_waits.push_back(reason);
}

// A copy runs on the stream of its source. It begins when both devices have done what they were
// told, and both go on after it.
void copy_between(int64_t source, int64_t target) {
  std::lock_guard<std::mutex> lock(mutex);
  host_time += speed.launch_s;
  Device& from = devices.at(source);
  Device& to = devices.at(target);
  double end = std::max({host_time, from.free_at, to.free_at}) + speed.copy_s;
  from.free_at = end;
  to.free_at = end;
  to.received++;
}

// ---- Memory
struct Block {
  void* memory;
  int64_t bytes;
  int64_t device;
};

void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  {
    std::lock_guard<std::mutex> lock(mutex);
    devices.at(block->device).bytes -= block->bytes;
  }
  std::free(block->memory);
  delete block;
}

struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    int64_t bytes = (int64_t(size) + PAGE - 1) / PAGE * PAGE;
    void* memory = nullptr;
    TORCH_CHECK(posix_memalign(&memory, 64, std::max(bytes, PAGE)) == 0, "out of memory");
    std::lock_guard<std::mutex> lock(mutex);
    Device& device = devices.at(current_device);
    device.bytes += bytes;
    device.peak_bytes = std::max(device.peak_bytes, device.bytes);
    auto* block = new Block{memory, bytes, current_device};
    return {memory, block, &free_block, c10::Device(TYPE, current_device)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* target, const void* source, size_t size) const override {
    std::memcpy(target, source, size);
  }
};

Allocator allocator;
REGISTER_ALLOCATOR(TYPE, &allocator);

// ---- What PyTorch asks of a kind of device
struct Guard final : c10::impl::DeviceGuardImplInterface {
  Guard() = default;
  explicit Guard(c10::DeviceType) {}
  c10::DeviceType type() const override { return TYPE; }
  c10::Device exchangeDevice(c10::Device device) const override {
    c10::Device old = getDevice();
    current_device = device.index();
    return old;
  }
  c10::Device getDevice() const override { return {TYPE, c10::DeviceIndex(current_device)}; }
  void setDevice(c10::Device device) const override { current_device = device.index(); }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    current_device = device.index();
  }
  c10::DeviceIndex deviceCount() const noexcept override { return devices.size(); }
  c10::Stream getStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }

  // An event is the time at which a device has done what it was told before the event.
  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex,
              const c10::EventFlag) const override {
    std::lock_guard<std::mutex> lock(mutex);
    if (*event == nullptr) {
      *event = new double;
    }
    *static_cast<double*>(*event) = devices.at(stream.device_index()).free_at;
  }
  void block(void* event, const c10::Stream& stream) const override {
    std::lock_guard<std::mutex> lock(mutex);
    double& free_at = devices.at(stream.device_index()).free_at;
    free_at = std::max(free_at, *static_cast<double*>(event));
  }
  bool queryEvent(void* event) const override {
    std::lock_guard<std::mutex> lock(mutex);
    return *static_cast<double*>(event) <= host_time;
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    delete static_cast<double*>(event);
  }
  void synchronizeEvent(void* event) const override {
    std::lock_guard<std::mutex> lock(mutex);
    host_time = std::max(host_time, *static_cast<double*>(event));
    host_waits.push_back("synchronize an event");
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    wait_for(stream.device_index(), "synchronize a stream");
  }
  void synchronizeDevice(const c10::DeviceIndex index) const override {
    wait_for(index, "synchronize a device");
  }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return devices.size(); }
  c10::DeviceIndex getCurrentDevice() const override { return current_device; }
  void setCurrentDevice(c10::DeviceIndex index) const override { current_device = index; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
    c10::DeviceIndex old = current_device;
    current_device = index;
    return old;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override {
    return exchangeDevice(index < 0 ? current_device : index);
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static at::Generator generator = at::detail::createCPUGenerator();
    return generator;
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::detail::createCPUGenerator();
  }
};

// ---- Tensors
bool is_simulated(const at::Tensor& tensor) { return tensor.device().type() == TYPE; }

c10::Device device_or_current(std::optional<at::Device> device) {
  if (device.has_value() && device->has_index()) {
    return *device;
  }
  return c10::Device(TYPE, current_device);
}

// The same memory as a tensor of the CPU.
at::Tensor on_cpu(const at::Tensor& tensor) {
  auto options = at::TensorOptions().dtype(tensor.dtype()).device(at::kCPU);
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), options);
}

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype,
                 std::optional<at::Layout>, std::optional<at::Device> device, std::optional<bool>,
                 std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard guard(device_or_current(device));
  auto keys = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic(size, &allocator, keys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride,
                         std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                         std::optional<at::Device> device, std::optional<bool>) {
  c10::DeviceGuard guard(device_or_current(device));
  auto keys = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(size, stride, &allocator, keys,
                                           c10::dtype_or_default(dtype));
}

at::Tensor as_strided(const at::Tensor& self, c10::IntArrayRef size, c10::IntArrayRef stride,
                      std::optional<int64_t> offset) {
  return at::native::as_strided_tensorimpl(self, size, stride, offset);
}

at::Tensor view(const at::Tensor& self, c10::SymIntArrayRef size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}

at::Tensor reshape_alias(const at::Tensor& self, c10::SymIntArrayRef size,
                         c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size),
                                    C10_AS_INTARRAYREF_SLOW(stride));
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source, int64_t offset,
                        c10::IntArrayRef size, c10::IntArrayRef stride) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(source);
  impl->set_sizes_and_strides(size, stride, offset);
  return self;
}

at::Tensor& set_whole_storage(at::Tensor& self, at::Storage source) {
  int64_t number = source.nbytes() / self.element_size();
  return set_storage(self, source, 0, {number}, {1});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
  return set_storage(self, source.storage(), source.storage_offset(), source.sizes(),
                     source.strides());
}

const at::Tensor& resize(const at::Tensor& self, c10::SymIntArrayRef size,
                         std::optional<at::MemoryFormat>) {
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  auto* impl = self.unsafeGetTensorImpl();
  size_t bytes = (c10::multiply_integers(sizes) + self.storage_offset()) * self.element_size();
  auto* storage = impl->unsafe_storage().unsafeGetStorageImpl();
  if (bytes > storage->nbytes()) {
    c10::DeviceGuard guard(self.device());
    c10::DataPtr memory = allocator.allocate(bytes);
    if (storage->nbytes() > 0) {
      std::memcpy(memory.get(), storage->data(), storage->nbytes());
    }
    storage->set_data_ptr_noswap(std::move(memory));
    storage->set_nbytes(bytes);
  }
  impl->set_sizes_contiguous(sizes);
  return self;
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& target, bool non_blocking) {
  at::Tensor source = is_simulated(self) ? on_cpu(self) : self;
  at::Tensor destination = is_simulated(target) ? on_cpu(target) : target;
  {
    at::NoGradGuard no_grad;
    destination.copy_(source.expand(destination.sizes()));
  }
  if (inside > 0) {
    return target;
  }
  if (is_simulated(self) && is_simulated(target)) {
    if (self.device() == target.device()) {
      launch(self.device().index(), speed.kernel_s);
    } else {
      copy_between(self.device().index(), target.device().index());
    }
    return target;
  }
  int64_t device = is_simulated(self) ? self.device().index() : target.device().index();
  launch(device, speed.copy_s);
  if (!non_blocking) {
    wait_for(device, is_simulated(self) ? "copy to the host" : "copy from the host");
  }
  return target;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& target) {
  if (self.sizes() != target.sizes()) {
    target.resize_(self.sizes());
  }
  return copy_from(self, target, false);
}

at::Scalar local_scalar_dense(const at::Tensor& self) {
  if (inside == 0) {
    wait_for(self.device().index(), "item");
  }
  return at::_local_scalar_dense(on_cpu(self));
}

// ---- All other operators
// What the arguments of an operator are: on which device, of which shapes.
struct Arguments {
  std::optional<c10::Device> device;
  std::vector<at::Tensor> tensors;
  bool has_mask = false;

  void add(const std::string& name, const c10::IValue& value) {
    if (value.isTensor()) {
      if (value.toTensor().defined()) {
        add_tensor(name, value.toTensor());
      }
    } else if (value.isDevice()) {
      if (!device.has_value() && value.toDevice().type() == TYPE) {
        device = device_or_current(value.toDevice());
      }
    } else if (value.isList()) {
      for (const c10::IValue& element : value.toListRef()) {
        add(name, element);
      }
    }
  }

  void add_tensor(const std::string& name, const at::Tensor& tensor) {
    tensors.push_back(tensor);
    has_mask = has_mask || tensor.scalar_type() == at::kBool;
    if (!is_simulated(tensor)) {
      // A number of the host goes along with the kernel.
      TORCH_CHECK(tensor.dim() == 0, name, " meets a tensor of the host");
      return;
    }
    if (!device.has_value()) {
      device = tensor.device();
    }
    TORCH_CHECK(tensor.device() == *device, name, " meets ", tensor.device(), " and ", *device);
  }
};

double count_flops(const std::string& name, const std::vector<at::Tensor>& tensors) {
  size_t first = 0;
  if (name == "aten::addmm" || name == "aten::baddbmm") {
    first = 1;
  } else if (name != "aten::mm" && name != "aten::bmm") {
    return 0;
  }
  return 2.0 * tensors.at(first).numel() * tensors.at(first + 1).size(-1);
}

bool has_size_of_values(const std::string& name, bool has_mask) {
  static const std::set<std::string> always = {
      "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::equal"};
  static const std::set<std::string> with_mask = {
      "aten::index", "aten::index_put_", "aten::_index_put_impl_"};
  return always.count(name) > 0 || (has_mask && with_mask.count(name) > 0);
}

void run_operator(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const std::string& name = op.schema().name();
  Arguments arguments;
  for (const c10::IValue& value : torch::jit::last(*stack, op.schema().arguments().size())) {
    arguments.add(name, value);
  }
  c10::Device device = arguments.device.value_or(device_or_current(std::nullopt));
  {
    Inside computing;
    c10::DeviceGuard guard(device);
    at::native::cpu_fallback(op, stack);
  }
  if (inside > 0) {
    return;
  }
  double flops = count_flops(name, arguments.tensors);
  launch(device.index(), speed.kernel_s + flops / speed.flops_per_s);
  if (has_size_of_values(name, arguments.has_mask)) {
    wait_for(device.index(), name);
  }
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("as_strided", TORCH_FN(as_strided));
  m.impl("view", TORCH_FN(view));
  m.impl("_reshape_alias", TORCH_FN(reshape_alias));
  m.impl("resize_", TORCH_FN(resize));
  m.impl("set_.source_Storage", TORCH_FN(set_whole_storage));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(set_storage));
  m.impl("set_.source_Tensor", TORCH_FN(set_tensor));
  m.impl("_copy_from", TORCH_FN(copy_from));
  m.impl("_copy_from_and_resize", TORCH_FN(copy_from_and_resize));
  m.impl("_local_scalar_dense", TORCH_FN(local_scalar_dense));
  // One kernel, as on CUDA. PyTorch would make it of eight, with the memory of six results.
  m.impl("silu_backward", torch::CppFunction::makeFromBoxedFunction<&run_operator>());
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&run_operator>());
}

TORCH_LIBRARY_IMPL(_, AutogradPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}

// ---- Autocast: matrix products in half precision, as on a GPU
#define IN_HALF_PRECISION(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  AT_FORALL_LOWER_PRECISION_FP(IN_HALF_PRECISION)
}

// ---- What Python asks
void start(int64_t number) {
  static Hooks hooks;
  devices.resize(number);
  at::RegisterPrivateUse1HooksInterface(&hooks);
}

void set_speed(double launch_s, double kernel_s, double flops_per_s, double copy_s,
               int64_t queue_length) {
  speed = {launch_s, kernel_s, flops_per_s, copy_s, queue_length};
}

// When host and devices have done all that was told.
double end_time() {
  double end = host_time;
  for (const Device& device : devices) {
    end = std::max(end, device.free_at);
  }
  return end;
}

void reset() {
  reset_time = end_time();
  host_time = reset_time;
  host_waits.clear();
  for (Device& device : devices) {
    device.free_at = reset_time;
    device.busy_s = 0;
    device.queue.clear();
    device.peak_bytes = device.bytes;
    device.received = 0;
  }
}

double elapsed_s() { return end_time() - reset_time; }
double host_s() { return host_time - reset_time; }
std::vector<std::string> get_host_waits() { return host_waits; }

std::vector<double> busy_s() {
  std::vector<double> values;
  for (const Device& device : devices) {
    values.push_back(device.busy_s);
  }
  return values;
}

std::vector<int64_t> get_counts(int64_t Device::*member) {
  std::vector<int64_t> values;
  for (const Device& device : devices) {
    values.push_back(device.*member);
  }
  return values;
}

std::vector<int64_t> allocated_bytes() { return get_counts(&Device::bytes); }
std::vector<int64_t> peak_bytes() { return get_counts(&Device::peak_bytes); }
std::vector<int64_t> received_copies() { return get_counts(&Device::received); }
int64_t get_device() { return current_device; }
void set_device(int64_t index) { current_device = index; }

TORCH_LIBRARY(simulated_devices, m) {
  m.def("start(int number) -> ()", &start);
  m.def(
      "set_speed(float launch_s, float kernel_s, float flops_per_s, float copy_s, int queue_length)"
      " -> ()", &set_speed);
  m.def("reset() -> ()", &reset);
  m.def("elapsed_s() -> float", &elapsed_s);
  m.def("host_s() -> float", &host_s);
  m.def("host_waits() -> str[]", &get_host_waits);
  m.def("busy_s() -> float[]", &busy_s);
  m.def("allocated_bytes() -> int[]", &allocated_bytes);
  m.def("peak_bytes() -> int[]", &peak_bytes);
  m.def("received_copies() -> int[]", &received_copies);
  m.def("get_device() -> int", &get_device);
  m.def("set_device(int index) -> ()", &set_device);
}

}  // namespace simulated
