# launch.sed: CUDA's launches and dynamic shared memory as plain C++, for the stand-ins in this
# folder. Lines keep their numbers.
#
#   sed -z -E -f cpu/cuda/launch.sed -e '1s@^@#line 1 "x.cu"\n@' x.cu | g++ -x c++ ...
#
#   kernel<T><<<grid, block>>>(x)   becomes   cpu::launch(kernel<T>, grid, block)(x)
#       Templates may be four deep, and a launch may take any number of lines.
#   extern __shared__ alignas(16) float x[]   becomes   float* x = cpu::dyn_shared<float>()
#   __shared__ alignas(16) float x[8]   becomes   __shared__ __align__(16) float x[8]
#       g++ takes no alignas in this place.
#
# Write these in .cu files (headers do not pass through here), and template-ids at a launch in full.
s/([A-Za-z_][A-Za-z0-9_:]*(<([^<>;{}]|<([^<>;{}]|<([^<>;{}]|<[^<>;{}]*>)*>)*>)*>)?)([ \n\\]*)<<<(([^>]|>[^>]|>>[^>])*)>>>([ \n\\]*)\(/cpu::launch(\1,\6\7)\9(/g
s/extern[ \n]+((__align__|alignas) *\([^;]*\)[ \n]*)?__shared__[ \n]+((__align__|alignas) *\([^;]*\)[ \n]*)?([A-Za-z_][A-Za-z0-9_:<> ]*[ >])([A-Za-z_][A-Za-z0-9_]*)[ \n]*\[[ \n]*\]/\5* \6 = cpu::dyn_shared<\5>()/g
s/__shared__([ \n]+)alignas *\(/__shared__\1__align__(/g
